//! Ctrl-C and termination: the first asks the run to save and stop, the second ends it at once.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

/// Listens for SIGINT, SIGTERM and SIGHUP from now on.
pub fn listen() -> anyhow::Result<()> {
    static LISTENING: Once = Once::new();
    let mut result = Ok(());
    LISTENING.call_once(|| {
        result = ctrlc::set_handler(|| {
            if ASKED.swap(true, Ordering::SeqCst) {
                std::process::exit(crate::error::INTERRUPTED);
            }
        });
    });
    Ok(result?)
}

/// Takes the end of standard input for a request to stop too: it comes when the process that started this one
/// wants it to stop, and when that process has died, however it died.
pub fn stop_at_end_of_input() {
    std::thread::spawn(|| {
        // An error is an end as well.
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        ASKED.store(true, Ordering::SeqCst);
    });
}

/// Whether the run was asked to stop.
pub fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}
