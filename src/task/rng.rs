//! The random streams of the authors' generator, to the last bit: numpy's `default_rng`, CPython's
//! `random`, numpy's legacy global generator and PyTorch's CPU generator.
//!
//! Crates with these generators exist, but what has to match are the calls on top of them (which of two
//! bounded-integer algorithms a call uses, which half of a draw it buffers), so they stand here together.

/// numpy's `SeedSequence`: hashes a seed of any number of 32-bit words into a pool of four.
pub struct SeedSequence {
    pool: [u32; 4],
}

impl SeedSequence {
    /// From little-endian words; no words count as one zero.
    pub fn new(entropy: &[u32]) -> Self {
        let mut h = 0x43b0_d7e5u32;
        let mut hashmix = |value: u32| {
            let v = value ^ h;
            h = h.wrapping_mul(0x931e_8875);
            let v = v.wrapping_mul(h);
            v ^ (v >> 16)
        };
        let mix = |x: u32, y: u32| {
            let r = 0xca01_f9ddu32.wrapping_mul(x).wrapping_sub(0x4973_f715u32.wrapping_mul(y));
            r ^ (r >> 16)
        };
        let mut pool: [u32; 4] = std::array::from_fn(|i| hashmix(entropy.get(i).copied().unwrap_or(0)));
        for s in 0..4 {
            for d in 0..4 {
                if s != d {
                    pool[d] = mix(pool[d], hashmix(pool[s]));
                }
            }
        }
        for &word in entropy.iter().skip(4) {
            for d in &mut pool {
                *d = mix(*d, hashmix(word));
            }
        }
        Self { pool }
    }

    /// The words of an integer seed, without leading zeros.
    pub fn words(seed: u128) -> Vec<u32> {
        let mut words = vec![seed as u32];
        let mut rest = seed >> 32;
        while rest > 0 {
            words.push(rest as u32);
            rest >>= 32;
        }
        words
    }

    pub fn pool(&self) -> [u32; 4] {
        self.pool
    }

    /// The first `N` 64-bit state words.
    pub fn state<const N: usize>(&self) -> [u64; N] {
        let mut g = 0x8b51_f9ddu32;
        let mut next = |i: usize| {
            let v = self.pool[i % 4] ^ g;
            g = g.wrapping_mul(0x58f3_8ded);
            let v = v.wrapping_mul(g);
            v ^ (v >> 16)
        };
        std::array::from_fn(|k| {
            let low = next(2 * k);
            u64::from(low) | u64::from(next(2 * k + 1)) << 32
        })
    }
}

/// The number in [0, 1) that 53 random bits stand for.
#[inline(always)]
pub fn unit_f64(bits: u64) -> f64 {
    bits as f64 * (1.0 / 9_007_199_254_740_992.0)
}

/// Uniform in 0..=top by masked rejection of 32-bit draws; nothing is drawn for `top` 0.
#[inline(always)]
fn masked(top: u32, mut next: impl FnMut() -> u32) -> u32 {
    if top == 0 {
        return 0;
    }
    let mask = u32::MAX >> top.leading_zeros();
    loop {
        let v = next() & mask;
        if v <= top {
            return v;
        }
    }
}

const PCG_MULTIPLIER: u128 = 0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645;

/// numpy's `Generator` over PCG64 (XSL-RR 128/64), with the calls that the tasks need.
#[derive(Clone, Debug)]
pub struct Pcg64 {
    state: u128,
    increment: u128,
    /// The high half of a draw whose low half was used; survives any other calls in between.
    half: Option<u32>,
}

impl Pcg64 {
    /// `default_rng(seed)`.
    pub fn new(seed: u128) -> Self {
        Self::from_words(&SeedSequence::words(seed))
    }

    /// A generator over the seed sequence of these entropy words.
    pub fn from_words(words: &[u32]) -> Self {
        let [a, b, c, d] = SeedSequence::new(words).state::<4>();
        let wide = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
        let mut rng = Self { state: 0, increment: wide(c, d) << 1 | 1, half: None };
        rng.step();
        rng.state = rng.state.wrapping_add(wide(a, b));
        rng.step();
        rng
    }

    /// State and increment.
    pub fn raw(&self) -> (u128, u128) {
        (self.state, self.increment)
    }

    /// The buffered half.
    pub fn buffered(&self) -> Option<u32> {
        self.half
    }

    #[inline(always)]
    fn step(&mut self) {
        self.state = self.state.wrapping_mul(PCG_MULTIPLIER).wrapping_add(self.increment);
    }

    /// Moves as far as `draws` calls of [`Pcg64::next_u64`] would, in logarithmic time.
    pub fn advance(&mut self, draws: u128) {
        let (mut multiplier, mut plus) = (PCG_MULTIPLIER, self.increment);
        let (mut all_multiplier, mut all_plus) = (1u128, 0u128);
        let mut rest = draws;
        while rest > 0 {
            if rest & 1 == 1 {
                all_multiplier = all_multiplier.wrapping_mul(multiplier);
                all_plus = all_plus.wrapping_mul(multiplier).wrapping_add(plus);
            }
            plus = multiplier.wrapping_add(1).wrapping_mul(plus);
            multiplier = multiplier.wrapping_mul(multiplier);
            rest >>= 1;
        }
        self.state = all_multiplier.wrapping_mul(self.state).wrapping_add(all_plus);
    }

    #[inline(always)]
    pub fn next_u64(&mut self) -> u64 {
        self.step();
        let folded = (self.state >> 64) as u64 ^ self.state as u64;
        folded.rotate_right((self.state >> 122) as u32)
    }

    #[inline(always)]
    pub fn next_u32(&mut self) -> u32 {
        if let Some(half) = self.half.take() {
            return half;
        }
        let draw = self.next_u64();
        self.half = Some((draw >> 32) as u32);
        draw as u32
    }

    /// The 53 bits of a uniform number in [0, 1); leaves the buffered half alone.
    #[inline(always)]
    pub fn random_bits(&mut self) -> u64 {
        self.next_u64() >> 11
    }

    /// `random()`.
    #[inline(always)]
    pub fn random(&mut self) -> f64 {
        unit_f64(self.random_bits())
    }

    /// Uniform in 0..=top by Lemire's method, as `integers` and `choice` draw.
    #[inline(always)]
    pub fn lemire(&mut self, top: u32) -> u32 {
        if top == 0 {
            return 0;
        }
        let n = u64::from(top) + 1;
        let mut m = u64::from(self.next_u32()) * n;
        if (m as u32 as u64) < n {
            let threshold = u64::from(u32::MAX - top) % n;
            while (m as u32 as u64) < threshold {
                m = u64::from(self.next_u32()) * n;
            }
        }
        (m >> 32) as u32
    }

    /// Uniform in 0..=top by masked rejection, as `permutation` and `shuffle` draw.
    #[inline(always)]
    pub fn masked(&mut self, top: u32) -> u32 {
        masked(top, || self.next_u32())
    }

    /// `integers(n)`.
    pub fn integers(&mut self, n: u32) -> u32 {
        self.lemire(n - 1)
    }

    /// `permutation(n)[0]`, without the array: the swaps are recorded and walked backwards from slot 0.
    pub fn permutation_first(&mut self, n: usize, swaps: &mut Vec<u32>) -> usize {
        swaps.clear();
        for i in (1..n as u32).rev() {
            let j = self.masked(i);
            swaps.push(j);
        }
        let mut at = 0;
        for (i, &j) in (1..n as u32).zip(swaps.iter().rev()) {
            if at == i {
                at = j;
            } else if at == j {
                at = i;
            }
        }
        at as usize
    }

    /// `choice(population, k, replace=False)`, as positions.
    pub fn choice(&mut self, population: usize, k: usize) -> Vec<usize> {
        if population > 10_000 && k > population / 50 {
            let mut all: Vec<usize> = (0..population).collect();
            for i in ((population - k).max(1)..population).rev() {
                all.swap(i, self.lemire(i as u32) as usize);
            }
            return all.split_off(population - k);
        }
        let mut out: Vec<usize> = Vec::with_capacity(k);
        let mut chosen = std::collections::HashSet::with_capacity(k);
        for j in population - k..population {
            let v = self.lemire(j as u32) as usize;
            let v = if chosen.insert(v) { v } else { j };
            chosen.insert(v);
            out.push(v);
        }
        for i in (1..k).rev() {
            out.swap(i, self.lemire(i as u32) as usize);
        }
        out
    }
}

/// The Mersenne Twister MT19937 with the calls of three libraries on top.
#[derive(Clone)]
pub struct Mt19937 {
    words: [u32; 624],
    at: usize,
}

impl Mt19937 {
    /// Knuth's initialisation: `np.random.seed` and `torch.manual_seed`.
    pub fn from_u32(seed: u32) -> Self {
        let mut words = [0u32; 624];
        words[0] = seed;
        for i in 1..624 {
            let last = words[i - 1];
            words[i] = 1_812_433_253u32.wrapping_mul(last ^ (last >> 30)).wrapping_add(i as u32);
        }
        Self { words, at: 624 }
    }

    /// Initialisation by array: CPython's `random.seed` of an integer with these little-endian words.
    pub fn from_words(key: &[u32]) -> Self {
        let mut rng = Self::from_u32(19_650_218);
        let mt = &mut rng.words;
        let (mut i, mut j) = (1, 0);
        let twist =
            |mt: &[u32; 624], i: usize, by: u32| mt[i] ^ (mt[i - 1] ^ (mt[i - 1] >> 30)).wrapping_mul(by);
        for _ in 0..key.len().max(624) {
            mt[i] = twist(mt, i, 1_664_525).wrapping_add(key[j]).wrapping_add(j as u32);
            i += 1;
            j = (j + 1) % key.len();
            if i == 624 {
                mt[0] = mt[623];
                i = 1;
            }
        }
        for _ in 0..623 {
            mt[i] = twist(mt, i, 1_566_083_941).wrapping_sub(i as u32);
            i += 1;
            if i == 624 {
                mt[0] = mt[623];
                i = 1;
            }
        }
        mt[0] = 0x8000_0000;
        rng
    }

    pub fn next_u32(&mut self) -> u32 {
        if self.at == 624 {
            let mt = &mut self.words;
            for i in 0..624 {
                let y = (mt[i] & 0x8000_0000) | (mt[(i + 1) % 624] & 0x7fff_ffff);
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                mt[i] = mt[(i + 397) % 624] ^ (y >> 1) ^ odd;
            }
            self.at = 0;
        }
        let mut y = self.words[self.at];
        self.at += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// CPython's `random._randbelow(n)`.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let v = (self.next_u32() >> (32 - bits)) as usize;
            if v < n {
                return v;
            }
        }
    }

    /// CPython's `random.sample(range(n), k)`.
    pub fn python_sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        let mut set_size = 21;
        if k > 5 {
            let mut power = 1;
            while power < 3 * k {
                power *= 4;
            }
            set_size += power;
        }
        if n <= set_size {
            let mut pool: Vec<usize> = (0..n).collect();
            (0..k)
                .map(|i| {
                    let j = self.below(n - i);
                    let taken = pool[j];
                    pool[j] = pool[n - i - 1];
                    taken
                })
                .collect()
        } else {
            let mut taken = std::collections::HashSet::with_capacity(k);
            (0..k)
                .map(|_| {
                    loop {
                        let j = self.below(n);
                        if taken.insert(j) {
                            return j;
                        }
                    }
                })
                .collect()
        }
    }

    /// numpy's legacy double, uniform in [0, 1).
    fn legacy_double(&mut self) -> f64 {
        let a = f64::from(self.next_u32() >> 5);
        let b = f64::from(self.next_u32() >> 6);
        (a * 67_108_864.0 + b) / 9_007_199_254_740_992.0
    }

    /// `np.random.uniform(low, high)`.
    pub fn legacy_uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.legacy_double()
    }

    /// The index that `np.random.choice` of an array of `n` takes.
    pub fn legacy_choice(&mut self, n: usize) -> usize {
        masked((n - 1) as u32, || self.next_u32()) as usize
    }

    /// `torch.rand` in float32.
    pub fn torch_rand(&mut self) -> f32 {
        (self.next_u32() & 0x00ff_ffff) as f32 * (1.0 / 16_777_216.0)
    }
}
