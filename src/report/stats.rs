//! Mean and spread over seeds.

/// What a few numbers say together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stats {
    pub n: usize,
    pub mean: f64,
    /// Standard deviation of the population they were drawn from (divisor n − 1); none of one number.
    pub sd: Option<f64>,
}

impl Stats {
    /// Of the finite ones among `values`; none if there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        let n = values.len();
        if n == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        Some(Self { n, mean, sd: (n > 1).then(|| (squares / (n - 1) as f64).sqrt()) })
    }

    /// Half the width of the 95 % confidence interval of the mean, by Student's t.
    pub fn interval(&self) -> Option<f64> {
        Some(student(self.n - 1) * self.sd? / (self.n as f64).sqrt())
    }
}

/// The 97.5 % quantile of Student's t.
///
/// From a table up to 10 degrees of freedom; beyond by the expansion in 1/ν around the normal quantile
/// (Abramowitz and Stegun, 26.7.5), right to four digits there.
pub fn student(degrees: usize) -> f64 {
    const TABLE: [f64; 10] =
        [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281];
    match degrees {
        0 => f64::INFINITY,
        1..=10 => TABLE[degrees - 1],
        _ => {
            let (z, v) = (1.959964f64, degrees as f64);
            let first = (z.powi(3) + z) / 4.0;
            let second = (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / 96.0;
            let third = (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / 384.0;
            z + first / v + second / v.powi(2) + third / v.powi(3)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        let stats = Stats::of([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]).unwrap();
        assert_eq!((stats.n, stats.mean), (8, 5.0));
        assert!((stats.sd.unwrap() - (32.0f64 / 7.0).sqrt()).abs() < 1e-12);
        assert!((stats.interval().unwrap() - 2.3646 * (32.0f64 / 56.0).sqrt()).abs() < 1e-9);
    }

    #[test]
    fn one_number_has_no_spread_and_none_no_mean() {
        let one = Stats::of([0.5]).unwrap();
        assert_eq!((one.n, one.mean, one.sd, one.interval()), (1, 0.5, None, None));
        assert_eq!(Stats::of([f64::NAN, f64::INFINITY]), None);
        assert_eq!(Stats::of([f64::NAN, 1.0]).unwrap().n, 1);
    }

    #[test]
    fn student_quantiles_are_those_of_the_tables() {
        for (degrees, want) in [(1, 12.706), (4, 2.776), (11, 2.201), (15, 2.131), (30, 2.042), (120, 1.980)]
        {
            assert!((student(degrees) - want).abs() < 6e-4, "{degrees}: {}", student(degrees));
        }
    }
}
