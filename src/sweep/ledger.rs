//! Who runs what, kept in files that any number of processes can share.
//!
//! # Claims
//!
//! `<id>.claim.<n>` is made exclusively: of several processes that try, one succeeds. The highest `n` holds the
//! run, so that a claim is taken over by making the next one, and nobody has to remove a file that somebody
//! else may just have renewed. Who was asleep for long finds a higher claim than its own and gives up. A holder
//! that stops before the run is done leaves its claim, marked as released.
//!
//! # Dead holders
//!
//! On the machine of the holder its process is looked up, by number and by the moment it began, so its runs can
//! be taken over at once. Other machines watch the claim's modification time, which the holder renews every few
//! seconds: when it has not *changed* for the length of the lease on the watcher's own monotonic clock, the
//! holder is dead. No two clocks are ever compared, so a wrong clock does no harm.
//!
//! # Results
//!
//! `<id>.done.json` is written when the run's summary is on the disk, `<id>.failed.json` when there will be none.
//! Both are small and appear whole; should one be damaged all the same, the run directory tells.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::files;

/// The ledger of a sweep.
pub struct Ledger {
    dir: PathBuf,
    owner: Owner,
    lease: Duration,
    /// What was last seen of the claims of others: number, modification time, and when it was first seen so.
    watched: HashMap<String, (u32, SystemTime, Instant)>,
}

/// Who holds a claim.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Owner {
    /// For people.
    pub host: String,
    pub pid: u32,
    /// What tells whether the process can be looked up from here: the boot of a machine and a namespace of
    /// process numbers. Empty where there is no such thing.
    machine: String,
    /// When the process began, in the clock ticks of its machine.
    began: u64,
}

/// The contents of a claim.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct ClaimFile {
    #[serde(flatten)]
    owner: Owner,
    device: String,
    released: bool,
}

/// A run that this process holds.
#[derive(Debug)]
pub struct Claim {
    pub id: String,
    number: u32,
    device: String,
}

/// `<id>.done.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Done {
    pub run: String,
    pub accuracy: f64,
    pub seconds: f64,
    pub host: String,
    pub device: String,
}

/// `<id>.failed.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failed {
    pub run: String,
    pub reason: String,
    pub host: String,
    pub device: String,
}

/// Where a run stands.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    Pending,
    /// By whom, and on what.
    Running {
        owner: String,
        device: String,
        mine: bool,
    },
    Done,
    Failed,
}

impl State {
    /// In one word.
    pub fn name(&self) -> &'static str {
        match self {
            State::Pending => "pending",
            State::Running { .. } => "running",
            State::Done => "done",
            State::Failed => "failed",
        }
    }
}

/// The ledger as it was at one moment.
#[derive(Default)]
pub struct Snapshot {
    entries: HashMap<String, Entry>,
}

#[derive(Default)]
struct Entry {
    done: bool,
    failed: bool,
    /// The highest claim.
    claim: u32,
    holder: Option<(String, String, bool)>,
}

impl Snapshot {
    /// Where a run stands.
    pub fn state(&self, id: &str) -> State {
        match self.entries.get(id) {
            Some(Entry { done: true, .. }) => State::Done,
            Some(Entry { failed: true, .. }) => State::Failed,
            Some(Entry { holder: Some((owner, device, mine)), .. }) => {
                State::Running { owner: owner.clone(), device: device.clone(), mine: *mine }
            }
            _ => State::Pending,
        }
    }

    /// Whether a claim of ours is still the highest.
    pub fn holds(&self, claim: &Claim) -> bool {
        self.entries.get(&claim.id).is_some_and(|entry| entry.claim == claim.number)
    }
}

impl Owner {
    /// This process.
    fn this() -> Self {
        let pid = std::process::id();
        Self {
            host: gethostname::gethostname().to_string_lossy().into_owned(),
            pid,
            machine: machine(),
            began: began(pid).unwrap_or(0),
        }
    }

    /// Whether the process is gone, as far as can be told from here.
    fn is_dead(&self, here: &Owner) -> bool {
        !self.machine.is_empty() && self.machine == here.machine && began(self.pid) != Some(self.began)
    }
}

/// This boot of this machine, and the namespace of its process numbers: containers have their own.
fn machine() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    let namespace = std::fs::read_link("/proc/self/ns/pid");
    match (boot, namespace) {
        (Ok(boot), Ok(namespace)) => format!("{} {}", boot.trim(), namespace.display()),
        _ => String::new(),
    }
}

/// When a process of this machine began; none if it is gone, or dead and not yet buried.
fn began(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in brackets may hold anything; state is the first field after it, the start the 20th.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    (!matches!(state, "Z" | "X")).then(|| fields.nth(18)?.parse().ok()).flatten()
}

impl Ledger {
    /// The ledger of the sweep in `dir`. Claims of other machines that are not renewed for `lease` are void.
    pub fn open(dir: &Path, lease: Duration) -> Self {
        Self { dir: dir.join("ledger"), owner: Owner::this(), lease, watched: HashMap::new() }
    }

    fn path(&self, id: &str, what: &str) -> PathBuf {
        self.dir.join(format!("{id}.{what}"))
    }

    fn claim_path(&self, id: &str, number: u32) -> PathBuf {
        self.path(id, &format!("claim.{number}"))
    }

    /// Looks at the whole ledger.
    pub fn look(&mut self) -> Result<Snapshot> {
        let entries = std::fs::read_dir(&self.dir)
            .with_context(|| format!("cannot read the ledger {}", self.dir.display()))?;
        let mut snapshot = Snapshot::default();
        for name in entries.flatten().map(|entry| entry.file_name()) {
            let name = name.to_string_lossy();
            let Some((id, what)) = name.split_once('.').filter(|(id, _)| !id.is_empty()) else { continue };
            match (what, what.strip_prefix("claim.").map(str::parse::<u32>)) {
                ("done.json", _) => snapshot.entries.entry(id.into()).or_default().done = true,
                ("failed.json", _) => snapshot.entries.entry(id.into()).or_default().failed = true,
                (_, Some(Ok(number))) => {
                    let entry = snapshot.entries.entry(id.into()).or_default();
                    entry.claim = entry.claim.max(number);
                }
                _ => {}
            }
        }
        for (id, entry) in &mut snapshot.entries {
            if entry.claim > 0 && !entry.done && !entry.failed {
                entry.holder = self.holder(id, entry.claim);
            }
        }
        self.watched.retain(|id, (number, ..)| snapshot.entries.get(id).is_some_and(|e| e.claim == *number));
        Ok(snapshot)
    }

    /// Who holds claim `number`: host and process, device, and whether it is this process. None if it is void.
    fn holder(&mut self, id: &str, number: u32) -> Option<(String, String, bool)> {
        let path = self.claim_path(id, number);
        // Opened, so that a network file system asks its server.
        let renewed =
            File::open(&path).and_then(|file| file.metadata()).and_then(|meta| meta.modified()).ok()?;
        let seen = self.watched.entry(id.into()).or_insert((number, renewed, Instant::now()));
        if (seen.0, seen.1) != (number, renewed) {
            *seen = (number, renewed, Instant::now());
        }
        let silent = seen.2.elapsed();
        // A claim that cannot be read has an owner all the same: only silence makes it void.
        let claim: Option<ClaimFile> =
            std::fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let mine = claim.as_ref().is_some_and(|claim| claim.owner == self.owner);
        let void = match &claim {
            Some(claim) => claim.released || claim.owner.is_dead(&self.owner),
            None => false,
        };
        if void || (!mine && silent > self.lease) {
            return None;
        }
        let owner = claim.as_ref().map_or("?".into(), |c| format!("{}:{}", c.owner.host, c.owner.pid));
        Some((owner, claim.map_or("?".into(), |claim| claim.device), mine))
    }

    /// Tries to take a run that was pending in `snapshot`; none if somebody else was faster.
    pub fn claim(&mut self, id: &str, snapshot: &Snapshot, device: &str) -> Result<Option<Claim>> {
        let number = snapshot.entries.get(id).map_or(0, |entry| entry.claim) + 1;
        let claim = Claim { id: id.to_string(), number, device: device.to_string() };
        let path = self.claim_path(id, number);
        let file = tempfile::Builder::new()
            .prefix(files::UNFINISHED)
            .tempfile_in(&self.dir)
            .with_context(|| format!("cannot write in the ledger {}", self.dir.display()))?;
        serde_json::to_writer(file.as_file(), &self.contents(&claim, false))?;
        match file.persist_noclobber(&path) {
            Ok(_) => {}
            Err(error) if error.error.kind() == ErrorKind::AlreadyExists => return Ok(None),
            Err(error) => {
                return Err(error.error).with_context(|| format!("cannot write {}", path.display()));
            }
        }
        // The snapshot may be old: the run may be done by now, or be held by a higher claim.
        let now = self.look()?;
        let entry = now.entries.get(id);
        if entry.is_none_or(|entry| entry.done || entry.failed || entry.claim != number) {
            remove(&path)?;
            return Ok(None);
        }
        for lower in (1..number).rev() {
            match std::fs::remove_file(self.claim_path(id, lower)) {
                Err(error) if error.kind() == ErrorKind::NotFound => break,
                _ => {}
            }
        }
        Ok(Some(claim))
    }

    fn contents(&self, claim: &Claim, released: bool) -> ClaimFile {
        ClaimFile { owner: self.owner.clone(), device: claim.device.clone(), released }
    }

    /// Shows that the holder of a claim is alive.
    pub fn renew(&self, claim: &Claim) -> Result<()> {
        let path = self.claim_path(&claim.id, claim.number);
        OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_modified(SystemTime::now()))
            .with_context(|| format!("cannot renew {}", path.display()))
    }

    /// Gives a run back: it is pending again.
    pub fn release(&self, claim: &Claim) -> Result<()> {
        let text = serde_json::to_vec(&self.contents(claim, true))?;
        files::write_atomic(&self.claim_path(&claim.id, claim.number), |out| out.write_all(&text))
    }

    /// Enters the result of a run.
    pub fn done(&self, claim: Claim, run: &str, accuracy: f64, seconds: f64) -> Result<()> {
        let (host, device) = (self.owner.host.clone(), claim.device.clone());
        self.enter(claim, "done.json", &Done { run: run.into(), accuracy, seconds, host, device })
    }

    /// Enters why there is no result.
    pub fn failed(&self, claim: Claim, run: &str, reason: &str) -> Result<()> {
        let (host, device) = (self.owner.host.clone(), claim.device.clone());
        self.enter(claim, "failed.json", &Failed { run: run.into(), reason: reason.into(), host, device })
    }

    fn enter(&self, claim: Claim, what: &str, entry: &impl Serialize) -> Result<()> {
        let json = serde_json::to_string_pretty(entry)? + "\n";
        files::write_atomic(&self.path(&claim.id, what), |out| out.write_all(json.as_bytes()))?;
        remove(&self.claim_path(&claim.id, claim.number))
    }

    /// Why a run failed; a damaged entry says so.
    pub fn reason(&self, id: &str) -> String {
        let path = self.path(id, "failed.json");
        let text = std::fs::read(&path).unwrap_or_default();
        match serde_json::from_slice::<Failed>(&text) {
            Ok(failed) => failed.reason,
            Err(_) => format!("{} is damaged", path.display()),
        }
    }

    /// What is known of a finished run; none if the entry is damaged.
    pub fn result(&self, id: &str) -> Option<Done> {
        serde_json::from_slice(&std::fs::read(self.path(id, "done.json")).ok()?).ok()
    }

    /// Forgets that a run failed, or that it is done: it is pending again.
    pub fn forget(&self, id: &str) -> Result<()> {
        for what in ["failed.json", "done.json"] {
            remove(&self.path(id, what))?;
        }
        Ok(())
    }

    /// Removes what processes that were killed left half-written. Others may be writing just now, so only what is
    /// older than a lease goes: by the clock that dates the files, since this machine's own may be wrong.
    pub fn sweep_up(&self) {
        let file = tempfile::Builder::new().prefix(files::UNFINISHED).tempfile_in(&self.dir);
        let now = file.and_then(|file| file.as_file().metadata()?.modified());
        let (Ok(now), Ok(entries)) = (now, std::fs::read_dir(&self.dir)) else { return };
        for entry in entries.flatten().filter(|entry| files::is_unfinished(&entry.file_name())) {
            let made = entry.metadata().and_then(|meta| meta.modified()).ok();
            let age = made.and_then(|made| now.duration_since(made).ok());
            if age.is_some_and(|age| age > self.lease) {
                // Only litter: a file that cannot be deleted does no harm.
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

/// Removes a file that may be gone already.
fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const LONG: Duration = Duration::from_secs(1000);

    /// A ledger of a process that is not this one.
    fn other(dir: &Path, pid: u32, machine: &str, lease: Duration) -> Ledger {
        let owner = Owner { host: "other".into(), pid, machine: machine.into(), began: 1 };
        Ledger { owner, ..Ledger::open(dir, lease) }
    }

    fn place() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("ledger")).unwrap();
        dir
    }

    fn take(ledger: &mut Ledger, id: &str) -> Option<Claim> {
        let snapshot = ledger.look().unwrap();
        (snapshot.state(id) == State::Pending).then(|| ledger.claim(id, &snapshot, "cpu").unwrap()).flatten()
    }

    #[test]
    fn a_run_goes_from_hand_to_hand_and_to_its_end() {
        let dir = place();
        let mut mine = Ledger::open(dir.path(), LONG);
        let mut theirs = other(dir.path(), 1, "elsewhere", LONG);
        let claim = take(&mut mine, "a").unwrap();
        assert!(take(&mut theirs, "a").is_none());
        assert!(matches!(theirs.look().unwrap().state("a"), State::Running { mine: false, .. }));
        assert!(matches!(mine.look().unwrap().state("a"), State::Running { mine: true, .. }));
        mine.release(&claim).unwrap();
        let claim = take(&mut theirs, "a").unwrap();
        theirs.failed(claim, "run", "lightning").unwrap();
        let snapshot = mine.look().unwrap();
        assert_eq!((snapshot.state("a"), mine.reason("a")), (State::Failed, "lightning".to_string()));
        // A process that still believes it pending does not get it.
        assert!(mine.claim("a", &Snapshot::default(), "cpu").unwrap().is_none());
        mine.forget("a").unwrap();
        let claim = take(&mut mine, "a").unwrap();
        mine.done(claim, "run", 0.5, 7.0).unwrap();
        assert_eq!(
            (theirs.look().unwrap().state("a"), theirs.result("a").unwrap().accuracy),
            (State::Done, 0.5)
        );
        let left: Vec<_> = std::fs::read_dir(dir.path().join("ledger")).unwrap().flatten().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[test]
    fn the_dead_are_followed_at_once_on_their_machine_and_after_the_lease_elsewhere() {
        let dir = place();
        // No process has the highest number that Linux allows, and none began at tick 1.
        let mut dead = other(dir.path(), 4_194_304, &machine(), LONG);
        let old = take(&mut dead, "a").unwrap();
        let mut mine = Ledger::open(dir.path(), LONG);
        if !machine().is_empty() {
            assert!(take(&mut mine, "a").is_some());
            // It was only asleep: its claim is no longer the highest.
            assert!(!dead.look().unwrap().holds(&old));
        }

        let short = Duration::from_millis(300);
        let mut far = other(dir.path(), 1, "elsewhere", LONG);
        let held = take(&mut far, "b").unwrap();
        let mut mine = Ledger::open(dir.path(), short);
        for _ in 0..5 {
            assert!(take(&mut mine, "b").is_none(), "it is renewed");
            std::thread::sleep(Duration::from_millis(100));
            far.renew(&held).unwrap();
        }
        // Its clock is years off: only the change counts.
        let file = File::options().write(true).open(mine.claim_path("b", 1)).unwrap();
        file.set_modified(SystemTime::now() + Duration::from_secs(100_000_000)).unwrap();
        assert!(take(&mut mine, "b").is_none());
        std::thread::sleep(short + short);
        assert!(take(&mut mine, "b").is_some());
        assert!(!far.look().unwrap().holds(&held));
    }

    #[test]
    fn damage_costs_time_and_no_result() {
        let dir = place();
        let mut mine = Ledger::open(dir.path(), Duration::from_millis(100));
        // Cut in half: somebody may hold it, so it is void after the lease only.
        std::fs::write(mine.claim_path("a", 1), "{\"host\": \"x").unwrap();
        assert!(take(&mut mine, "a").is_none());
        std::thread::sleep(Duration::from_millis(200));
        assert!(take(&mut mine, "a").is_some());
        std::fs::write(mine.path("b", "failed.json"), "{").unwrap();
        assert_eq!(mine.look().unwrap().state("b"), State::Failed);
        assert!(mine.reason("b").contains("b.failed.json is damaged"));
        std::fs::write(mine.path("c", "done.json"), "").unwrap();
        assert_eq!(mine.look().unwrap().state("c"), State::Done);
        std::fs::remove_dir_all(dir.path().join("ledger")).unwrap();
        let error = format!("{:#}", mine.look().err().unwrap());
        assert!(error.contains("cannot read the ledger"), "{error}");
    }

    /// Many processes, some of which die with a claim in their hands: nobody ever holds what somebody else holds,
    /// and everything is done once.
    #[test]
    fn a_crowd_does_everything_once() {
        const RUNS: usize = 40;
        let dir = place();
        let held: Vec<AtomicUsize> = (0..RUNS).map(|_| AtomicUsize::new(0)).collect();
        let done: Vec<AtomicUsize> = (0..RUNS).map(|_| AtomicUsize::new(0)).collect();
        let worker = |number: u128| {
            let mut random = crate::task::rng::Pcg64::new(number);
            let mut below = |n: usize| random.integers(n.max(1) as u32) as usize;
            // A new ledger after every death.
            'lives: loop {
                let mut ledger = Ledger::open(dir.path(), LONG);
                loop {
                    let snapshot = ledger.look().unwrap();
                    let pending: Vec<usize> =
                        (0..RUNS).filter(|run| snapshot.state(&run.to_string()) == State::Pending).collect();
                    let all = (0..RUNS).all(|run| snapshot.state(&run.to_string()) == State::Done);
                    if all {
                        return;
                    }
                    let Some(&run) = pending.get(below(pending.len())) else { continue };
                    let Some(claim) = ledger.claim(&run.to_string(), &snapshot, "cpu").unwrap() else {
                        continue;
                    };
                    assert_eq!(held[run].fetch_add(1, Ordering::SeqCst), 0, "run {run} is held twice");
                    std::thread::yield_now();
                    held[run].fetch_sub(1, Ordering::SeqCst);
                    match below(4) {
                        0 => ledger.release(&claim).unwrap(),
                        // Death: the claim is that of a process that cannot be.
                        1 => {
                            let text = serde_json::to_vec(&ClaimFile {
                                owner: Owner { pid: 4_194_304, ..ledger.owner.clone() },
                                device: "cpu".into(),
                                released: machine().is_empty(),
                            });
                            let path = ledger.claim_path(&claim.id, claim.number);
                            files::write_atomic(&path, |out| out.write_all(&text.unwrap())).unwrap();
                            continue 'lives;
                        }
                        _ => {
                            done[run].fetch_add(1, Ordering::SeqCst);
                            ledger.done(claim, "run", 0.0, 0.0).unwrap();
                        }
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for number in 1..7 {
                let worker = &worker;
                scope.spawn(move || worker(number));
            }
        });
        assert!(done.iter().all(|count| count.load(Ordering::SeqCst) == 1));
    }
}
