//! Named ranges of work: for the profile's clock and, with the feature `nvtx`, for NVIDIA's Nsight tools.
//!
//! Off by default, when a range costs one look at a flag. Ranges nest: an update has its parts, and these have
//! the nodes of the tape.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};

/// What a range is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A part of an update.
    Part,
    /// The forward pass of a node.
    Forward,
    /// The backward pass of a node.
    Backward,
}

/// Is told where ranges begin and end.
pub trait Watch {
    fn begin(&mut self, kind: Kind, name: &'static str);
    fn end(&mut self);
}

/// Whether any thread watches; NVTX watches always.
static WATCHED: AtomicBool = AtomicBool::new(cfg!(feature = "nvtx"));

thread_local! {
    static WATCH: RefCell<Option<Box<dyn Watch>>> = const { RefCell::new(None) };
}

/// Whether ranges are watched.
#[cfg(feature = "cuda")]
pub fn watched() -> bool {
    WATCHED.load(Ordering::Relaxed)
}

/// Runs `f` and tells `watch` the ranges that it enters on this thread.
pub fn watching<T>(watch: impl Watch + 'static, f: impl FnOnce() -> T) -> T {
    struct Restore;
    impl Drop for Restore {
        fn drop(&mut self) {
            WATCHED.store(cfg!(feature = "nvtx"), Ordering::Relaxed);
            WATCH.with(|slot| slot.borrow_mut().take());
        }
    }
    WATCH.with(|slot| *slot.borrow_mut() = Some(Box::new(watch)));
    WATCHED.store(true, Ordering::Relaxed);
    let _restore = Restore;
    f()
}

/// A range that ends when this is dropped.
#[must_use]
pub struct Range(bool);

/// Begins a range.
#[inline]
pub fn range(kind: Kind, name: &'static str) -> Range {
    let watched = WATCHED.load(Ordering::Relaxed);
    if watched {
        begin(kind, name);
    }
    Range(watched)
}

/// Runs `f` as a part of an update.
#[inline]
pub fn part<T>(name: &'static str, f: impl FnOnce() -> T) -> T {
    let _range = range(Kind::Part, name);
    f()
}

#[cold]
fn begin(kind: Kind, name: &'static str) {
    #[cfg(feature = "nvtx")]
    match kind {
        Kind::Backward => nvtx::range_push!("{name}, backward"),
        Kind::Forward | Kind::Part => nvtx::range_push!("{name}"),
    };
    WATCH.with(|slot| {
        if let Some(watch) = &mut *slot.borrow_mut() {
            watch.begin(kind, name);
        }
    });
}

#[cold]
fn end() {
    WATCH.with(|slot| {
        if let Some(watch) = &mut *slot.borrow_mut() {
            watch.end();
        }
    });
    #[cfg(feature = "nvtx")]
    nvtx::range_pop!();
}

impl Drop for Range {
    #[inline]
    fn drop(&mut self) {
        if self.0 {
            end();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;

    struct Log(Rc<RefCell<Vec<String>>>);

    impl Watch for Log {
        fn begin(&mut self, kind: Kind, name: &'static str) {
            self.0.borrow_mut().push(format!("{kind:?} {name}"));
        }
        fn end(&mut self) {
            self.0.borrow_mut().push("end".into());
        }
    }

    #[test]
    fn ranges_nest_and_are_seen_while_watched() {
        let log = Rc::new(RefCell::new(vec![]));
        part("before", || ());
        watching(Log(log.clone()), || part("outer", || drop(range(Kind::Backward, "inner"))));
        part("after", || ());
        assert_eq!(*log.borrow(), ["Part outer", "Backward inner", "end", "end"]);
    }
}
