//! A dump, a pre-dump or a restore in progress.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::timeout;

use crate::error::{Action, CriuError};
use crate::log::LogTail;
use crate::pages::PageSocket;
use crate::rpc::{Request, Response, Socket, kind};
use crate::shim::SegmentTable;
use crate::worker::Process;

/// How long CRIU may take to end after it closed its socket.
const EXIT_LIMIT: Duration = Duration::from_secs(5);

/// Processes below a restoring CRIU that are looked at when it is killed.
const DESCENDANTS_MAX: usize = 65536;

/// A moment at which CRIU waits for an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// Dump: before the freeze. The page server must be served from here on.
    PreDump,
    /// Dump: the tree is frozen, its sockets still as they were. The common
    /// place to close the gate. Only this and [`NetworkLock`](Self::NetworkLock)
    /// stand between the freeze and the first read.
    QueryExtFiles,
    /// Dump: as [`QueryExtFiles`](Self::QueryExtFiles) and just before it, but
    /// only where the tree has a network namespace other than CRIU's.
    NetworkLock,
    /// Dump: everything is written, the tree is frozen, its sockets are in
    /// repair mode. Answering `true` makes CRIU kill the tree without a packet,
    /// `false` makes it run on: this is the place of the commit.
    PostDump,
    /// Restore: images are parsed, no process exists yet.
    PreRestore,
    /// Restore: everything is there and nothing has run; sockets are in repair
    /// mode. The last moment to refuse, upon which CRIU kills the copy.
    PostRestore {
        /// Root of the copy.
        pid: i32,
    },
    /// The network may be let through: a dump that failed in a foreign network
    /// namespace, or a restore into one.
    NetworkUnlock,
    /// Restore: sockets are out of repair mode, the tree has not run. An
    /// answer cannot stop it any more.
    PreResume,
    /// Restore: the tree runs.
    PostResume,
    /// A moment that has no meaning here: answer `true`.
    Other(String),
    /// The end; no answer is expected.
    Finished(Outcome),
}

/// How a session ended without a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The tree is dumped and dead.
    Dumped,
    /// What has changed is written down, and the tree runs on.
    PreDumped,
    /// The copy runs.
    Restored {
        /// Its root. Its parent is the nearest reaper above the caller, once
        /// CRIU has ended.
        pid: i32,
    },
    /// An answer was `false`, and CRIU has undone what it did: a dumped tree
    /// runs on, a restored one is gone.
    Refused,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// CRIU works.
    Working,
    /// CRIU waits for our answer.
    Asked,
    /// CRIU has given its last answer, or is gone.
    Over,
}

/// A dump, a pre-dump or a restore in progress. A pre-dump asks nothing: it
/// comes to its end by itself when its pages are served, or not any more.
///
/// CRIU is never killed by dropping this. While CRIU holds a tree, killing it
/// would let the tree run on with its sockets in repair mode. Dropping closes
/// CRIU's socket, which CRIU takes as `false` at the next moment it would ask:
/// a dump before its end is undone and the tree runs on, a restore before
/// [`Notice::PostRestore`] was answered is killed. Nobody waits for that, so
/// before the commit do `answer(false)` and read on until
/// [`Outcome::Refused`]; after it, read on to the end.
#[derive(Debug)]
pub struct Session {
    action: Action,
    process: Process,
    socket: Socket,
    page_socket: Option<PageSocket>,
    segments: Option<SegmentTable>,
    log: PathBuf,
    state: State,
    /// An answer was `false`.
    refused: bool,
}

impl Session {
    pub(crate) fn new(
        action: Action,
        process: Process,
        socket: Socket,
        page_socket: Option<PageSocket>,
        segments: Option<SegmentTable>,
        log: PathBuf,
    ) -> Self {
        Self {
            action,
            process,
            socket,
            page_socket,
            segments,
            log,
            state: State::Working,
            refused: false,
        }
    }

    /// CRIU's process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Whether CRIU is killed when this is dropped: only while it has touched
    /// nothing.
    pub(crate) fn expend(&mut self, expendable: bool) {
        self.process.expendable = expendable;
    }

    /// Tells CRIU, who waits for an answer with the tree frozen, which shared
    /// segments are taken care of: it lists no pages of theirs. Only a worker
    /// with [`WorkerOptions::shim`](crate::WorkerOptions::shim) hears it, and
    /// has room for some hundred; pages that come of others all the same may be
    /// ignored.
    ///
    /// # Errors
    ///
    /// It cannot be written down.
    pub fn leave_out(&self, device: u64, inodes: &BTreeSet<u64>) -> Result<(), CriuError> {
        let Some(segments) = &self.segments else {
            return Ok(());
        };
        segments
            .name(device, inodes)
            .map_err(|source| CriuError::Socket {
                action: self.action,
                source,
            })
    }

    /// Whether CRIU still runs, and so has held what it holds without a break.
    pub fn alive(&mut self) -> bool {
        self.process.alive()
    }

    /// A descriptor whose other end is CRIU's, to hear of its end in the moment
    /// of it. CRIU takes this process for gone only when it is closed as well.
    ///
    /// # Errors
    ///
    /// There are no descriptors left.
    pub fn holder(&self) -> Result<OwnedFd, CriuError> {
        self.socket.duplicate().map_err(|source| CriuError::Socket {
            action: self.action,
            source,
        })
    }

    /// Our end of the page stream; once, and not for a restore.
    ///
    /// Serve it with [`serve_pages`](crate::serve_pages) before the answer to
    /// [`Notice::QueryExtFiles`], or drop it: CRIU waits there even when the
    /// dump has failed, the tree still frozen. So the stream may come to its
    /// end without a mistake in a dump that fails. One that was not taken is
    /// dropped when CRIU first says something there.
    pub fn page_socket(&mut self) -> Option<PageSocket> {
        self.page_socket.take()
    }

    /// Waits for the next moment, at most `within`. Cancelling it, or calling
    /// it again after [`CriuError::Silent`], loses nothing.
    ///
    /// # Errors
    ///
    /// CRIU failed, ended, or was silent for too long; or the last notice has
    /// not been answered.
    pub async fn next(&mut self, within: Duration) -> Result<Notice, CriuError> {
        self.must_be(State::Working, "next")?;
        let action = self.action;
        let response = match timeout(within, self.response()).await {
            Err(_) => return Err(CriuError::Silent { action, within }),
            Ok(Err(source)) => return Err(CriuError::Socket { action, source }),
            Ok(Ok(None)) => return Err(self.died().await),
            Ok(Ok(Some(response))) => response,
        };
        if response.kind == kind::NOTIFY
            && let Some(notify) = &response.notify
        {
            let notice = notice(notify.script.as_deref().unwrap_or_default(), notify.pid);
            tracing::trace!(?notice, "criu asks");
            self.state = State::Asked;
            return Ok(notice);
        }
        self.state = State::Over;
        self.finished(response)
    }

    /// The next response. CRIU that gives up before anybody serves its pages
    /// says farewell to the page server first and waits for the answer.
    async fn response(&mut self) -> io::Result<Option<Response>> {
        if let Some(pages) = &self.page_socket {
            tokio::select! {
                response = self.socket.receive() => return response,
                _ = pages.stream.readable() => {}
            }
            self.page_socket = None;
        }
        self.socket.receive().await
    }

    fn finished(&mut self, response: Response) -> Result<Notice, CriuError> {
        let expected = match self.action {
            Action::Dump => kind::DUMP,
            Action::PreDump => kind::SINGLE_PRE_DUMP,
            Action::Restore => kind::RESTORE,
        };
        if response.success && response.kind == expected {
            return Ok(Notice::Finished(match (self.action, response.restore) {
                (Action::Dump, _) => Outcome::Dumped,
                (Action::PreDump, _) => Outcome::PreDumped,
                (Action::Restore, Some(restore)) => Outcome::Restored { pid: restore.pid },
                (Action::Restore, None) => {
                    return Err(CriuError::Socket {
                        action: self.action,
                        source: io::Error::new(io::ErrorKind::InvalidData, "no pid in the answer"),
                    });
                }
            }));
        }
        if self.refused {
            return Ok(Notice::Finished(Outcome::Refused));
        }
        Err(CriuError::Failed {
            action: self.action,
            errno: response.cr_errno,
            log: LogTail::read(&self.log).or_else(self.process.stderr(), response.cr_errmsg),
        })
    }

    async fn died(&mut self) -> CriuError {
        let status = self.process.wait(EXIT_LIMIT).await;
        // Not before: who was cancelled meanwhile may ask again.
        self.state = State::Over;
        CriuError::Died {
            action: self.action,
            status,
            log: LogTail::read(&self.log).or_else(self.process.stderr(), None),
        }
    }

    /// Answers the last notice: go on, or undo everything.
    ///
    /// # Errors
    ///
    /// Nothing was asked, or CRIU is gone.
    pub async fn answer(&mut self, proceed: bool) -> Result<(), CriuError> {
        self.must_be(State::Asked, "answer")?;
        self.refused |= !proceed;
        let request = Request {
            kind: kind::NOTIFY,
            notify_success: Some(proceed),
            ..Request::default()
        };
        self.socket
            .send(&request)
            .await
            .map_err(|source| CriuError::Socket {
                action: self.action,
                source,
            })?;
        self.state = State::Working;
        Ok(())
    }

    fn must_be(&self, wanted: State, call: &'static str) -> Result<(), CriuError> {
        if self.state == wanted {
            return Ok(());
        }
        Err(CriuError::OutOfTurn {
            call,
            state: match self.state {
                State::Working => "while criu was working",
                State::Asked => "while criu was waiting for an answer",
                State::Over => "after the session had ended",
            },
        })
    }

    /// What CRIU's log says up to now.
    #[must_use]
    pub fn log(&self) -> LogTail {
        LogTail::read(&self.log)
    }

    /// Kills CRIU and, for a restore, every process it has made. The last
    /// resort for a CRIU that does not answer any more.
    ///
    /// A dumped tree then runs on at once unless it is fenced (stopped, or in
    /// a frozen cgroup), and its TCP sockets stay in repair mode.
    ///
    /// # Errors
    ///
    /// CRIU could not be killed.
    pub async fn kill(mut self) -> Result<(), CriuError> {
        // Listed before the parent dies, since orphans are not found any more.
        let copies = match self.action {
            Action::Restore => descendants(self.process.pid()),
            Action::Dump | Action::PreDump => Vec::new(),
        };
        self.state = State::Over;
        let killed = self.process.kill().await;
        for pid in copies.into_iter().rev() {
            let pid = nix::unistd::Pid::from_raw(pid);
            if let Err(error) = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL) {
                tracing::debug!(%pid, %error, "a half-made process was gone already");
            }
        }
        killed.map_err(|source| CriuError::Socket {
            action: self.action,
            source,
        })
    }
}

fn notice(script: &str, pid: Option<i32>) -> Notice {
    match (script, pid) {
        ("pre-dump", _) => Notice::PreDump,
        ("query-ext-files", _) => Notice::QueryExtFiles,
        ("network-lock", _) => Notice::NetworkLock,
        ("post-dump", _) => Notice::PostDump,
        ("pre-restore", _) => Notice::PreRestore,
        ("post-restore", Some(pid)) => Notice::PostRestore { pid },
        ("network-unlock", _) => Notice::NetworkUnlock,
        ("pre-resume", _) => Notice::PreResume,
        ("post-resume", _) => Notice::PostResume,
        (other, _) => Notice::Other(other.to_owned()),
    }
}

/// Every process below `root`, parents before children.
fn descendants(root: i32) -> Vec<i32> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&pid) = found.get(next) {
        next += 1;
        let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
            continue;
        };
        for thread in threads.flatten() {
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            found.extend(
                children
                    .split_ascii_whitespace()
                    .filter_map(|child| child.parse::<i32>().ok()),
            );
            if found.len() > DESCENDANTS_MAX {
                break;
            }
        }
    }
    found.remove(0);
    found
}
