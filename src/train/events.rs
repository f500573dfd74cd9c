//! TensorBoard event files: scalars only.
//!
//! The two crates that write them bring a download of protocol files or a TLS stack into the build; the
//! format is one message in one frame.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use prost::Message;

/// `tensorboard.Event`, with the fields in use.
#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Scalar>,
}

#[derive(Clone, PartialEq, Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// An event file, open for writing.
pub struct Events {
    file: File,
}

impl Events {
    /// Makes the file; TensorBoard takes those whose name holds `tfevents`.
    pub fn create(path: &Path, wall_time: f64) -> std::io::Result<Self> {
        let mut events = Self { file: File::create(path)? };
        let version = Some("brain.Event:2".into());
        events.write(Event { wall_time, step: 0, file_version: version, summary: None })?;
        Ok(events)
    }

    /// Appends scalars of one step.
    pub fn scalars(
        &mut self,
        step: i64,
        wall_time: f64,
        scalars: impl IntoIterator<Item = (String, f32)>,
    ) -> std::io::Result<()> {
        let value =
            scalars.into_iter().map(|(tag, value)| Scalar { tag, simple_value: Some(value) }).collect();
        self.write(Event { wall_time, step, file_version: None, summary: Some(Summary { value }) })
    }

    /// One TFRecord frame: length, its checksum, message, its checksum.
    fn write(&mut self, event: Event) -> std::io::Result<()> {
        let message = event.encode_to_vec();
        let length = (message.len() as u64).to_le_bytes();
        let mut frame = length.to_vec();
        frame.extend(masked_crc(&length).to_le_bytes());
        frame.extend(&message);
        frame.extend(masked_crc(&message).to_le_bytes());
        self.file.write_all(&frame)
    }
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}
