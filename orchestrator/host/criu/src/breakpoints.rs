//! Breakpoints that CRIU can set without a wait.
//!
//! To get hold of a thread again CRIU sets a hardware breakpoint where the code
//! that it put into the thread ends (`ptrace_set_breakpoint` of
//! `compel/arch/x86/src/lib/infect.c`), in the dump and in the restore. For the
//! kernel that is an event bound to a task. With the first such event of the
//! whole machine it begins to look for them whenever tasks are switched, and
//! waits for an RCU grace period until every CPU does (`account_event` of
//! `kernel/events/core.c`): 8 to 18 ms with the tree frozen, measured on two idle
//! CPUs of Linux 6.18. An event that is there already spares CRIU that wait.

use perf_event::events::Software;
use perf_event::{Builder, Counter};
use tokio::task;

/// An event that counts nothing, bound to this process. As long as it exists the
/// kernel does not wait for another one.
///
/// The kernel forgets a second after the last one ended, `perf_sched_delayed` in
/// the same place.
#[derive(Debug)]
pub(crate) struct Event {
    _counter: Counter,
}

/// Makes the event, which takes the wait that CRIU does not have then. None
/// where it cannot be made: a kernel without performance events has no
/// breakpoints either, and CRIU finds another way.
pub(crate) async fn event() -> Option<Event> {
    let made = task::spawn_blocking(|| {
        let pid = i32::try_from(std::process::id()).map_err(std::io::Error::other)?;
        // Its descriptor is not handed on to other programs.
        Builder::new(Software::DUMMY).observe_pid(pid).build()
    });
    match made.await.map_err(std::io::Error::other).flatten() {
        Ok(counter) => Some(Event { _counter: counter }),
        Err(error) => {
            tracing::debug!(%error, "no event for breakpoints: CRIU may wait for the kernel");
            None
        }
    }
}
