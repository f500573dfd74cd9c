//! x
use super::Report;
use anyhow::Result;
use std::path::Path;
pub fn page(_report: &Report, _out: &Path) -> Result<String> {
    Ok(String::new())
}
