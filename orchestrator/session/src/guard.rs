//! Somebody who clears up when the process that moves a tree is killed.
//!
//! A guard is this same program, started with one end of a pipe. It sleeps
//! until the pipe ends. Ended with a word, all is well; without one its owner
//! was killed, and what it has left is settled at once and not by whoever
//! comes next.

use std::io::{PipeWriter, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use migrate_core::journal::Side;

use crate::error::Error;
use crate::journal;
use crate::progress::Reporter;
use crate::recover;
use crate::state::State;
use crate::sweep::owner_alive;

/// The verb that a guard is started with.
pub const VERB: &str = "guard";

/// How long a killed owner may take to be gone. Giving back memory takes 22 ms
/// a GiB.
const OWNER_LIMIT: Duration = Duration::from_secs(60);

/// How often somebody who cannot say yet who runs the tree is asked again.
const TRIES: u32 = 10;

/// A guard that sleeps.
#[derive(Debug)]
pub(crate) struct Guard {
    child: Child,
    word: PipeWriter,
}

impl Guard {
    /// Starts one for the record that this process has just begun. A migration
    /// can do without: the next command clears up as well.
    pub(crate) fn start(migration_id: &str, side: Side) -> Option<Self> {
        match Self::spawn(migration_id, side) {
            Ok(guard) => Some(guard),
            Err(error) => {
                tracing::warn!(%error, "nobody clears up if this process is killed");
                None
            }
        }
    }

    fn spawn(migration_id: &str, side: Side) -> std::io::Result<Self> {
        let (pipe, word) = std::io::pipe()?;
        let side = match side {
            Side::Source => "source",
            Side::Destination => "destination",
        };
        let child = Command::new("/proc/self/exe")
            .args([VERB, migration_id, side])
            .current_dir("/")
            .stdin(pipe)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Not to be reached by a Ctrl-C that is meant for its owner.
            .process_group(0)
            .spawn()?;
        Ok(Self { child, word })
    }

    /// Tells the guard that there is nothing to do. The record must be at its
    /// end, one way or another.
    pub(crate) fn dismiss(mut self) {
        let _ = self.word.write_all(b".");
        drop(self.word);
        let mut child = self.child;
        // It ends at once; nobody waits for that but who reaps it.
        std::thread::spawn(move || child.wait());
    }
}

/// What a guard does: waits for the end of its owner, and clears up.
///
/// # Errors
///
/// The journal cannot be read.
pub async fn watch(migration_id: String, side: Side) -> Result<(), Error> {
    // What ends a login or a terminal must not end this.
    let _ = nix::unistd::setsid();
    let ended = tokio::task::spawn_blocking(|| {
        let mut word = Vec::new();
        std::io::stdin().lock().take(1).read_to_end(&mut word)
    });
    if !matches!(ended.await, Ok(Ok(0))) {
        return Ok(());
    }
    let state = State::open()?;
    let deadline = Instant::now() + OWNER_LIMIT;
    for _ in 0..TRIES {
        let Some(record) = journal::read(&state, &migration_id, side)? else {
            return Ok(());
        };
        while owner_alive(&record) && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let settled = recover::settle(&state, &record, Some(&Reporter::silent())).await;
        settled.log();
        if settled.outcome != recover::Outcome::Undecided {
            return Ok(());
        }
    }
    Ok(())
}
