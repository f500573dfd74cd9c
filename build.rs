//! Names the commit that is built, and compiles `kernels/*.cu` for the feature `cuda`: machine code for the GPUs
//! named below and PTX for newer ones, embedded in the program.
//!
//! | variable | meaning |
//! |---|---|
//! | `NVCC`, else `CUDA_HOME`, `CUDA_PATH`, `PATH`, `/usr/local/cuda` | where nvcc is |
//! | `CUDA_COMPUTE_CAP` | the GPUs, as `90` or `8.0` or `80,90`; without it, those in this machine |
//!
//! Files named `*_sm90a.cu` use what only GPUs of compute capability 9.0 have: they are compiled for those alone, and
//! left out where those are not asked for.
//!
//! What was compiled is kept with a hash of everything that went in: only what changed is compiled again.

use std::collections::hash_map::DefaultHasher;
use std::fmt::Write;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs};

/// The oldest GPUs that have what the kernels use: bf16 and asynchronous copies.
const OLDEST: u32 = 80;

/// The GPUs that files named `*_sm90a.cu` are for.
const HOPPER: u32 = 90;

type Result<T> = std::result::Result<T, String>;

fn main() {
    println!("cargo::rustc-env=SELECTIVBENCH_COMMIT={}", commit().unwrap_or("unknown".into()));
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if let Err(message) = compile() {
        println!("cargo::error={message}");
    }
}

/// What goes into the program.
const COMPILED: [&str; 6] = ["src", "kernels", "assets", "build.rs", "Cargo.toml", "Cargo.lock"];

/// The commit of this folder, with `+changes` where what is compiled differs from it; none in an archive.
///
/// Runs again when HEAD moves and when anything changes that is compiled, and would be compiled again anyway.
fn commit() -> Option<String> {
    for path in COMPILED.iter().filter(|path| Path::new(path).exists()) {
        println!("cargo::rerun-if-changed={path}");
    }
    let git = |args: &[&str]| -> Option<String> {
        let run = Command::new("git")
            .arg("--no-optional-locks")
            .args(args)
            .output()
            .ok()
            .filter(|run| run.status.success())?;
        Some(String::from_utf8(run.stdout).ok()?.trim_end().to_string())
    };
    // An archive that was unpacked inside of another repository is none of its commits.
    if !git(&["rev-parse", "--show-prefix"])?.is_empty() {
        return None;
    }
    // A file that is not there would make cargo run this every time.
    for file in ["HEAD", "logs/HEAD"] {
        let path = git(&["rev-parse", "--git-path", file])?;
        if Path::new(&path).exists() {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    let changes = git(&[&["status", "--porcelain", "--"][..], &COMPILED].concat())?;
    Some(git(&["rev-parse", "HEAD"])? + if changes.is_empty() { "" } else { "+changes" })
}

fn compile() -> Result<()> {
    let nvcc = nvcc()?;
    let version = toolkit_version(&nvcc)?;
    let caps = compute_caps()?;
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));

    let general: Vec<String> =
        ["-fatbin", "-std=c++17", "-O3", "-lineinfo", "-Werror", "all-warnings", "-Xfatbin", "-compress-all"]
            .map(String::from)
            .to_vec();
    let mut flags = general.clone();
    for (i, cap) in caps.iter().enumerate() {
        // PTX of the newest: the driver compiles it for GPUs newer than that.
        let ptx = if i + 1 == caps.len() { format!(",compute_{cap}") } else { String::new() };
        flags.extend(["-gencode".into(), format!("arch=compute_{cap},code=[sm_{cap}{ptx}]")]);
    }

    let mut hopper = general;
    hopper.extend(["-gencode".into(), "arch=compute_90a,code=sm_90a".into()]);

    let (mut sources, mut headers) = (Vec::new(), Vec::new());
    let entries = fs::read_dir("kernels").map_err(|e| format!("cannot read the folder kernels: {e}"))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("cu") => sources.push(path),
            Some("cuh") => headers.push(path),
            _ => {}
        }
    }
    sources.sort();
    headers.sort();
    let mut common = DefaultHasher::new();
    version.hash(&mut common);
    for header in &headers {
        read(header)?.hash(&mut common);
    }

    let wanted = |source: &&PathBuf| !for_hopper(source) || caps.contains(&HOPPER);
    let queue = Mutex::new(sources.iter().filter(wanted));
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let Some(source) = queue.lock().expect("no thread panics").next() else { break };
                    let flags = if for_hopper(source) { &hopper } else { &flags };
                    if let Err(message) = compile_one(&nvcc, flags, source, &out, common.clone()) {
                        failures.lock().expect("no thread panics").push(message);
                    }
                }
            });
        }
    });
    if let Some(message) = failures.into_inner().expect("no thread panics").into_iter().next() {
        return Err(message);
    }

    let mut code = String::new();
    for source in &sources {
        let name = stem(source);
        let (image, only) = match (wanted(&source), for_hopper(source)) {
            (true, hopper) => (
                format!("include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{name}.fatbin\"))"),
                if hopper { "Some((9, 0))" } else { "None" },
            ),
            (false, _) => ("&[]".into(), "Some((9, 0))"),
        };
        writeln!(
            code,
            "/// `kernels/{name}.cu`.\npub static {}: Module = Module {{ name: \"{name}\", image: {image}, only: \
             {only} }};",
            name.to_uppercase()
        )
        .expect("writing to a string");
    }
    fs::write(out.join("kernels.rs"), code).map_err(|e| format!("cannot write kernels.rs: {e}"))?;
    let caps: Vec<String> = caps.iter().map(u32::to_string).collect();
    println!("cargo::rustc-env=SELECTIVBENCH_CUDA_VERSION={version}");
    println!("cargo::rustc-env=SELECTIVBENCH_CUDA_CAPS={}", caps.join(","));
    Ok(())
}

/// Compiles one file unless what went into it is the same as last time.
fn compile_one(
    nvcc: &Path,
    flags: &[String],
    source: &Path,
    out: &Path,
    mut hasher: DefaultHasher,
) -> Result<()> {
    (flags, read(source)?).hash(&mut hasher);
    let hash = hasher.finish().to_string();
    let (image, stamp) = (out.join(stem(source) + ".fatbin"), out.join(stem(source) + ".hash"));
    if image.exists() && fs::read_to_string(&stamp).is_ok_and(|old| old == hash) {
        return Ok(());
    }
    let run = Command::new(nvcc)
        .args(flags)
        .arg("-o")
        .arg(&image)
        .arg(source)
        .output()
        .map_err(|e| format!("cannot run {}: {e}", nvcc.display()))?;
    let text = String::from_utf8_lossy(&[run.stdout, run.stderr].concat()).into_owned();
    if !run.status.success() {
        return Err(format!("{} does not compile: {text}", source.display()));
    }
    // Such as products that wait for each other because registers ran out: right, but much slower.
    for line in text.lines().filter(|line| line.contains("Performance Loss")) {
        println!("cargo::warning={}: {line}", source.display());
    }
    fs::write(&stamp, hash).map_err(|e| format!("cannot write {}: {e}", stamp.display()))
}

/// Whether a file is for GPUs of compute capability 9.0 alone.
fn for_hopper(path: &Path) -> bool {
    stem(path).ends_with("_sm90a")
}

fn stem(path: &Path) -> String {
    path.file_stem().expect("a source has a name").to_string_lossy().into_owned()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))
}

fn nvcc() -> Result<PathBuf> {
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let path = env::var_os("PATH").unwrap_or_default();
    env::var_os("NVCC")
        .map(PathBuf::from)
        .into_iter()
        .chain(homes.map(|home| home.join("bin/nvcc")))
        .chain(env::split_paths(&path).map(|folder| folder.join("nvcc")))
        .chain([PathBuf::from("/usr/local/cuda/bin/nvcc")])
        .find(|path| path.is_file())
        .ok_or_else(|| {
            "the feature `cuda` needs nvcc: install a CUDA toolkit (12.4 or newer) and put its bin folder into \
             PATH, or build without `--features cuda`"
                .into()
        })
}

/// The toolkit's version, as in `13.0`.
fn toolkit_version(nvcc: &Path) -> Result<String> {
    let run = Command::new(nvcc)
        .arg("--version")
        .output()
        .map_err(|e| format!("cannot run {}: {e}", nvcc.display()))?;
    let text = String::from_utf8_lossy(&run.stdout).into_owned();
    let version = text.split("release ").nth(1).and_then(|rest| rest.split(',').next()).map(String::from);
    let version = version.ok_or_else(|| format!("{} --version names no release", nvcc.display()))?;
    let number = |text: Option<&str>| text.and_then(|text| text.parse().ok()).unwrap_or(0);
    let mut parts = version.split('.');
    let parsed: (u32, u32) = (number(parts.next()), number(parts.next()));
    if parsed < (12, 4) {
        return Err(format!(
            "{} is of CUDA {version}; the feature `cuda` needs 12.4 or newer",
            nvcc.display()
        ));
    }
    Ok(version)
}

/// The compute capabilities to compile for, ascending, as in 90.
fn compute_caps() -> Result<Vec<u32>> {
    let text = match env::var("CUDA_COMPUTE_CAP") {
        Ok(text) => text,
        Err(_) => {
            let query = ["--query-gpu=compute_cap", "--format=csv,noheader"];
            match Command::new("nvidia-smi").args(query).output() {
                Ok(run) if run.status.success() => {
                    String::from_utf8_lossy(&run.stdout).trim().replace('\n', ",")
                }
                _ => {
                    return Err("no GPU is in this machine to compile for: set CUDA_COMPUTE_CAP, as in \
                                CUDA_COMPUTE_CAP=90"
                        .into());
                }
            }
        }
    };
    let mut caps = Vec::new();
    for part in text.split(',') {
        match part.trim().replace('.', "").parse::<u32>() {
            Ok(cap) if cap >= OLDEST => caps.push(cap),
            Ok(cap) if cap >= 10 => {
                return Err(format!(
                    "a GPU of compute capability {part} cannot run the kernels; they need 8.0"
                ));
            }
            _ => return Err(format!("CUDA_COMPUTE_CAP is {text:?}; it must be a number as in 90")),
        }
    }
    caps.sort_unstable();
    caps.dedup();
    Ok(caps)
}
