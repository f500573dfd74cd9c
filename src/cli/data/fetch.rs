//! Where the recordings of `task.encoding` are to be had, and whether they are there.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use md5::Md5;
use sha2::{Digest, Sha256};

use crate::bail_input;
use crate::cli::print;
use crate::task::recordings::{speech, spikes};

/// Say where the recordings of a data set are to be had, and check what is there
///
/// Downloads nothing. Prints the addresses, sizes and published hashes and how to unpack the files, then looks into
/// the folder: hashes of archives that lie there, lists and files of the data set, whether they can be read. What is
/// missing is told in one sentence, with exit code 2.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  selectivbench data fetch gsc
  selectivbench data fetch shd --dir /data/heidelberg")]
pub(super) struct FetchArgs {
    #[arg(value_enum)]
    set: SetName,
    /// The folder, as task.data names it [default: data/gsc, data/shd or data/ssc]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum SetName {
    /// Google Speech Commands, for task.encoding gsc
    Gsc,
    /// Spiking Heidelberg Digits, for task.encoding shd
    Shd,
    /// Spiking Speech Commands, for task.encoding ssc
    Ssc,
}

/// What is downloaded.
struct Archive {
    file: &'static str,
    size: &'static str,
    hash: Hash,
}

enum Hash {
    Md5(&'static str),
    Sha256(&'static str),
}

struct Source {
    name: &'static str,
    title: &'static str,
    /// Behind it comes the name of an archive.
    address: &'static str,
    archives: &'static [Archive],
    unpack: &'static str,
}

/// The hash is the one that torchaudio and TensorFlow Datasets check.
const GSC: Source = Source {
    name: "gsc",
    title: "Google Speech Commands 0.02 (Warden 2018, arXiv 1804.03209), CC BY 4.0",
    address: "https://storage.googleapis.com/download.tensorflow.org/data/",
    archives: &[Archive {
        file: "speech_commands_v0.02.tar.gz",
        size: "2.4 GB",
        hash: Hash::Sha256("af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58"),
    }],
    unpack: "tar -xzf speech_commands_v0.02.tar.gz",
};

/// The hashes are those that Tonic and SpikingJelly check, here and below.
const SHD: Source = Source {
    name: "shd",
    title: "Spiking Heidelberg Digits (Cramer et al. 2022, doi 10.1109/TNNLS.2020.3044364), CC BY 4.0",
    address: "https://zenkelab.org/datasets/",
    archives: &[
        Archive {
            file: "shd_train.h5.zip",
            size: "0.13 GB",
            hash: Hash::Md5("f3252aeb598ac776c1b526422d90eecb"),
        },
        Archive {
            file: "shd_test.h5.zip",
            size: "0.04 GB",
            hash: Hash::Md5("1503a5064faa34311c398fb0a1ed0a6f"),
        },
    ],
    unpack: "unzip shd_train.h5.zip && unzip shd_test.h5.zip",
};

const SSC: Source = Source {
    name: "ssc",
    title: "Spiking Speech Commands (Cramer et al. 2022, doi 10.1109/TNNLS.2020.3044364), CC BY 4.0",
    address: "https://zenkelab.org/datasets/",
    archives: &[
        Archive {
            file: "ssc_train.h5.zip",
            size: "1.2 GB",
            hash: Hash::Md5("d102be95e7144fcc0553d1f45ba94170"),
        },
        Archive {
            file: "ssc_valid.h5.zip",
            size: "0.2 GB",
            hash: Hash::Md5("b4eee3516a4a90dd0c71a6ac23a8ae43"),
        },
        Archive {
            file: "ssc_test.h5.zip",
            size: "0.3 GB",
            hash: Hash::Md5("a35ff1e9cffdd02a20eb850c17c37748"),
        },
    ],
    unpack: "unzip ssc_train.h5.zip && unzip ssc_valid.h5.zip && unzip ssc_test.h5.zip",
};

pub(super) fn run(args: FetchArgs) -> anyhow::Result<()> {
    let source = match args.set {
        SetName::Gsc => &GSC,
        SetName::Shd => &SHD,
        SetName::Ssc => &SSC,
    };
    let dir = args.dir.unwrap_or_else(|| Path::new("data").join(source.name));
    let shown = dir.display();
    print(source.title)?;
    for Archive { file, size, hash } in source.archives {
        let (kind, hash) = hash.parts();
        print(format_args!("  {}{file}  about {size}, {kind} {hash}", source.address))?;
    }
    print(format_args!("download into {shown} and unpack there: cd {shown} && {}", source.unpack))?;

    if !dir.is_dir() {
        bail_input!("{shown} is missing: make the folder, and download and unpack the files named above")
    }
    for Archive { file, hash, .. } in source.archives {
        let path = dir.join(file);
        let (kind, published) = hash.parts();
        match hash.of(&path)? {
            None => {}
            Some(own) if own == published => print(format_args!("{}: {kind} as published", path.display()))?,
            Some(own) => bail_input!(
                "{} has the {kind} {own} instead of the published one: it is cut off or changed, download it again",
                path.display()
            ),
        }
    }
    let found = match args.set {
        SetName::Gsc => speech::inspect(&dir)?,
        SetName::Shd => spikes::inspect(&spikes::SHD, &dir)?,
        SetName::Ssc => spikes::inspect(&spikes::SSC, &dir)?,
    };
    print(format_args!("{shown} can be used: {found}"))
}

impl Hash {
    fn parts(&self) -> (&'static str, &'static str) {
        match self {
            Hash::Md5(hash) => ("md5", hash),
            Hash::Sha256(hash) => ("sha256", hash),
        }
    }

    /// The hash of a file, if it is there.
    fn of(&self, path: &Path) -> anyhow::Result<Option<String>> {
        let Ok(file) = File::open(path) else { return Ok(None) };
        Ok(Some(match self {
            Hash::Md5(_) => digest::<Md5>(file)?,
            Hash::Sha256(_) => digest::<Sha256>(file)?,
        }))
    }
}

fn digest<D: Digest>(mut file: File) -> std::io::Result<String> {
    let (mut digest, mut bytes) = (D::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut bytes)? {
            0 => return Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            count => digest.update(&bytes[..count]),
        }
    }
}
