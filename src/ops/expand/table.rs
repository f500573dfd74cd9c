//! What a step of the input shows where symbols are recordings: a row of a table that is made once.

#[cfg(feature = "cuda")]
use std::collections::HashMap;
#[cfg(feature = "cuda")]
use std::sync::Mutex;

use candle_core::Result;

/// Frames of recordings, one a row.
pub struct Table {
    channels: usize,
    values: Values,
    /// Where it was sent to, by the number of the GPU.
    #[cfg(feature = "cuda")]
    sent: Mutex<HashMap<usize, super::cuda::DeviceTable>>,
}

/// The numbers of a table.
pub enum Values {
    /// [rows, channels]
    Dense(Vec<f32>),
    /// Whole numbers, most of them 0: those of row r are `entries[starts[r]..starts[r + 1]]`, by channel.
    Counts {
        /// [rows + 1]
        starts: Vec<u32>,
        /// channel · 2¹⁶ + count
        entries: Vec<u32>,
    },
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "a table of {} x {}", self.rows(), self.channels)
    }
}

impl Table {
    /// Fails where the values are not rows of `channels`, or too many to be counted in 32 bits.
    pub fn new(channels: usize, values: Values) -> Result<Self> {
        let inside = match &values {
            Values::Dense(values) => channels > 0 && values.len().is_multiple_of(channels),
            Values::Counts { starts, entries } => {
                channels > 0
                    && starts.first() == Some(&0)
                    && starts.is_sorted()
                    && starts.last().is_some_and(|&last| last as usize == entries.len())
                    && entries.iter().all(|entry| ((entry >> 16) as usize) < channels)
            }
        };
        let table = Self {
            channels,
            values,
            #[cfg(feature = "cuda")]
            sent: Default::default(),
        };
        if !inside || table.rows() >= super::NONE as usize {
            candle_core::bail!("expand: the values of a table do not fit its {channels} channels")
        }
        Ok(table)
    }

    pub fn channels(&self) -> usize {
        self.channels
    }

    pub fn values(&self) -> &Values {
        &self.values
    }

    pub fn rows(&self) -> usize {
        match &self.values {
            Values::Dense(values) => values.len() / self.channels.max(1),
            Values::Counts { starts, .. } => starts.len().saturating_sub(1),
        }
    }

    /// Adds row `row` to `x`.
    pub fn add_row(&self, row: usize, x: &mut [f32]) {
        match &self.values {
            Values::Dense(values) => {
                let row = &values[row * self.channels..][..self.channels];
                x.iter_mut().zip(row).for_each(|(x, value)| *x += value);
            }
            Values::Counts { starts, entries } => {
                for entry in &entries[starts[row] as usize..starts[row + 1] as usize] {
                    x[(entry >> 16) as usize] += (entry & 0xffff) as f32;
                }
            }
        }
    }

    /// The table on a GPU, sent there once.
    #[cfg(feature = "cuda")]
    pub(super) fn on(&self, gpu: &crate::cuda::Gpu) -> Result<super::cuda::DeviceTable> {
        let mut sent = self.sent.lock().unwrap();
        let number = gpu.stream().context().ordinal();
        if let Some(table) = sent.get(&number) {
            return Ok(table.clone());
        }
        let table = super::cuda::DeviceTable::send(&self.values, gpu)?;
        Ok(sent.entry(number).or_insert(table).clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_added_and_bad_tables_refused() {
        let counts = |starts: &[u32], entries: &[u32]| {
            Table::new(3, Values::Counts { starts: starts.to_vec(), entries: entries.to_vec() })
        };
        let table = counts(&[0, 0, 2], &[7, 2 << 16 | 1]).unwrap();
        let mut x = [0.5, 0.5, 0.5];
        table.add_row(0, &mut x);
        table.add_row(1, &mut x);
        assert_eq!((table.rows(), x), (2, [7.5, 0.5, 1.5]));
        assert!(counts(&[0, 2, 1], &[1, 1]).is_err(), "starts must ascend");
        assert!(counts(&[0, 1], &[1, 1]).is_err(), "entries behind the last row");
        assert!(counts(&[0, 1], &[3 << 16 | 1]).is_err(), "channel 3 of 3");
        assert!(Table::new(3, Values::Dense(vec![0.0; 4])).is_err(), "rows of another width");
        let table = Table::new(2, Values::Dense(vec![1.0, 2.0, 3.0, 4.0])).unwrap();
        let mut x = [10.0, 10.0];
        table.add_row(1, &mut x);
        assert_eq!(x, [13.0, 14.0]);
    }
}
