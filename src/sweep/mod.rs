//! Many runs from one file: each exactly once, by any number of processes on any number of machines that share
//! a folder, without a server.
//!
//! * [`mod@file`] reads what is to be run, `wandb` the sweep files of the released code;
//! * [`plan`] gives every run its identity: a hash of what can change its result;
//! * [`ledger`] keeps, in files, what is pending, running, done and failed, and who runs what;
//! * [`worker`] carries out runs as child processes, one after the other on each device;
//! * [`slurm`] starts and watches workers on a Slurm cluster;
//! * [`board`] shows where a sweep stands.
//!
//! # The folder of a sweep
//!
//! | | |
//! |---|---|
//! | `runs/<label>-<id>/` | run directories as `train` makes them, with `log.txt`, what the run printed |
//! | `ledger/<id>.done.json` | the run is done, and its summary was there |
//! | `ledger/<id>.failed.json` | the run failed: why, how often it was tried |
//! | `ledger/<id>.claim.<n>` | somebody runs it; the highest `n` holds |
//! | `slurm/` | batch scripts, outputs and numbers of the jobs of `--launcher slurm` |
//! | `sweep.yaml` | the sweep file as last read |
//! | `status.csv` | every run with its state and reason, as of the last time that a process looked |

pub mod board;
pub mod estimate;
pub mod file;
pub mod ledger;
pub mod plan;
pub mod slurm;
mod wandb;
pub mod worker;

pub use plan::{Plan, Planned};
