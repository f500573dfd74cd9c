//! Files that appear whole or not at all.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::bad_input;

/// Names of unfinished files begin with this; what a killed process left can be deleted.
pub(crate) const UNFINISHED: &str = ".unfinished-";

/// The folder that a path stands in.
fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Writes a file under a temporary name, brings it to the disk, and renames it.
///
/// A reader sees the old file or the new one, whatever happens in between.
pub fn write_atomic(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> anyhow::Result<()> {
    write_atomic_file(path, |file| {
        let mut writer = BufWriter::with_capacity(1 << 20, file);
        fill(&mut writer)?;
        Ok(writer.flush()?)
    })
}

/// [`write_atomic`] for what is not written from front to back, or fails for other reasons.
pub fn write_atomic_file(path: &Path, fill: impl FnOnce(&File) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let write = || -> anyhow::Result<()> {
        let file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(folder(path))?;
        fill(file.as_file())?;
        file.as_file().sync_all()?;
        let file = file.persist(path)?;
        Ok(set_readable(&file)?)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Temporary files are made for their owner alone; what stays gets the permissions of an ordinary file.
#[cfg(unix)]
fn set_readable(file: &File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(std::fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn set_readable(_: &File) -> std::io::Result<()> {
    Ok(())
}

/// Whether a file with this name is one that a killed process left unfinished.
pub fn is_unfinished(name: &std::ffi::OsStr) -> bool {
    name.to_string_lossy().starts_with(UNFINISHED)
}

/// Deletes what a killed process left unfinished in `dir`.
pub fn delete_unfinished(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        if is_unfinished(&entry.file_name()) {
            // Only litter: a file that cannot be deleted does no harm.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// The contents of a file that the user named.
pub fn read(path: &Path, what: &str) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| bad_input!("cannot read {what} {}: {error}", path.display()))
}

/// Checks that a file can be written at `path`, before any work is done for it.
pub fn check_writable(path: &Path) -> anyhow::Result<()> {
    if path.is_dir() {
        return Err(bad_input!("cannot write {}: it is a folder", path.display()));
    }
    tempfile::Builder::new()
        .prefix(UNFINISHED)
        .tempfile_in(folder(path))
        .map(drop)
        .map_err(|error| bad_input!("cannot write {}: {error}", path.display()))
}

/// Makes `dir` and checks that files can be written in it.
pub fn create_folder(dir: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir)
        .map_err(|error| bad_input!("cannot make the folder {}: {error}", dir.display()))?;
    check_writable(&dir.join("file"))
        .map_err(|error| bad_input!("cannot write in the folder {}: {error}", dir.display()))
}

/// `base`, or the first of `base-2`, `base-3`, … that does not exist yet.
pub fn unused(base: &Path) -> PathBuf {
    let name = base.file_name().unwrap_or_default().to_string_lossy().into_owned();
    std::iter::once(base.to_path_buf())
        .chain((2..).map(|i| base.with_file_name(format!("{name}-{i}"))))
        .find(|path| !path.exists())
        .expect("some number is free")
}
