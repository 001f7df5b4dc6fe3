//! CRIU's log: the lines that matter, and what to do about them.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

/// How much of the end of a log is looked at, in bytes. At the default level a
/// whole log has a few KiB; with debug output the cause stands near the end.
const TAIL_BYTES: u64 = 256 << 10;

/// Lines that are kept.
const LINES_MAX: usize = 16;

/// Lines before an error that are kept with it: a warning there often says why.
const LINES_BEFORE: usize = 2;

/// Errors that CRIU logs and lives with.
const HARMLESS: &[&str] = &[
    // Without CAP_SYS_RESOURCE; the soft limit has been raised before.
    "rlimit: Can't setup RLIMIT_NOFILE",
    // Only says that the line above it was fatal.
    "Dumping FAILED",
    "Restoring FAILED",
    // The page socket is no TCP socket.
    "Unable to set TCP_NODELAY",
    "Unable to set TCP_CORK",
    // Our own `answer(false)`.
    "RPC client reported script error",
    "One of more action scripts failed",
];

/// Patterns in CRIU's errors, and the way out. The first match wins.
const ADVICE: &[(&str, &str)] = &[
    (
        "No space left on device",
        "the tmpfs of the images is full: free memory or enlarge it",
    ),
    (
        "Unable to interrupt task",
        "a process of the tree ended during the dump: try again",
    ),
    (
        "File exists",
        "a process or thread of the tree needs a PID that is taken on this host: end its owner, or wait until it is reaped",
    ),
    (
        "io_uring",
        "CRIU cannot move io_uring: configure the program not to use it",
    ),
    (
        "[userfaultfd]",
        "CRIU cannot move a userfaultfd: stop what uses it",
    ),
    (
        "[perf_event]",
        "CRIU cannot move perf events: stop profiling the process",
    ),
    (
        "anon_inode:bpf",
        "CRIU cannot move this BPF object: unload it first",
    ),
    (
        "Runaway socket",
        "a unix socket leads out of the tree: move both ends together, or choose --stdio if it is a standard stream",
    ),
    (
        "External socket is used",
        "a unix socket leads out of the tree: move both ends together, or choose --stdio if it is a standard stream",
    ),
    (
        "Can't dump half of stream unix connection",
        "a unix connection leads out of the tree: close it, move both ends together, or choose --stdio if it is a standard stream",
    ),
    (
        "with unreachable peer",
        "a unix socket leads out of the tree: close it, or move both ends together",
    ),
    (
        "Can't bind inet socket back",
        "the address is not on this host, or another process has its port: stop that process",
    ),
    (
        "Can't bind inet socket",
        "the address is not on this host, or another process has its port: stop that process",
    ),
    (
        "Can't connect inet socket back",
        "the address of the connection is not on this host, or no route leads to its peer",
    ),
    (
        "In-flight connection",
        "connections wait to be accepted: try again when the program accepts them",
    ),
    (
        "consider using --tcp-established",
        "this is a bug: TCP connections were not allowed",
    ),
    (
        "is outside of its pid namespace",
        "the tree's session leader is not part of it: move the session leader's tree, or allow shell jobs",
    ),
    (
        "shell-job",
        "the tree belongs to a terminal session outside itself: it must be moved as a shell job",
    ),
    (
        "ttys have no",
        "the tree uses a terminal whose other end is outside: choose --stdio",
    ),
    (
        "Can't set tty params",
        "a terminal can only be replaced by a terminal",
    ),
    (
        "file locks are hold",
        "this is a bug: file locks were not allowed",
    ),
    (
        "Can't find suitable path for handle",
        "an inotify watch points to a file that cannot be found any more: restart the watcher",
    ),
    (
        "inotify",
        "an inotify watch cannot be moved: its file must exist on the destination",
    ),
    (
        "Can't dump ghost file",
        "a large deleted file is still open: close it, or raise the limit for deleted files",
    ),
    (
        "Can't create link remap",
        "a deleted file with other names is still open: close it",
    ),
    (
        "has bad size",
        "a file differs on the destination: copy it there",
    ),
    (
        "has bad build-ID",
        "a program or library differs on the destination: install the same package version",
    ),
    (
        "has bad mode",
        "a file has other permissions on the destination: make them the same",
    ),
    (
        "Can't open file",
        "a file is missing on the destination: copy it there",
    ),
    (
        "capabilities do not match run time",
        "the destination's CPU lacks features that the program uses",
    ),
    (
        "CPU instruction capabilities",
        "the destination's CPU lacks features that the program uses",
    ),
    (
        "overmounted",
        "a file is open below a mount that hides it: unmount that first",
    ),
    (
        "doesn't live in IPC ns",
        "SysV shared memory can only be moved with its IPC namespace: run the workload in one of its own",
    ),
    (
        "MPTCP",
        "CRIU cannot move MPTCP: turn it off for this program",
    ),
    (
        "corked",
        "a corked socket cannot be moved: try again in a moment",
    ),
    (
        "SEIZE",
        "another program traces the process: detach the debugger or tracer",
    ),
    (
        "ptrace",
        "another program traces the process: detach the debugger or tracer",
    ),
    (
        "seize",
        "the process cannot be stopped: it may be traced by another program, or hang in the kernel",
    ),
    (
        "Can't dump file",
        "CRIU cannot move an open file of this kind: close it first",
    ),
    (
        "Unsupported",
        "the tree uses something that CRIU cannot move; the log names it",
    ),
];

/// The part of a CRIU log that explains a failure.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogTail {
    path: PathBuf,
    lines: Vec<String>,
    first_error: Option<String>,
}

impl LogTail {
    /// Reads the end of the log at `path`. A log that cannot be read gives an
    /// empty tail: the failure that is being reported matters more.
    #[must_use]
    pub fn read(path: &Path) -> Self {
        let mut bytes = Vec::new();
        let read = File::open(path).and_then(|mut file| {
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
            file.take(TAIL_BYTES).read_to_end(&mut bytes)
        });
        if let Err(error) = read {
            tracing::debug!(log = %path.display(), %error, "criu's log cannot be read");
        }
        Self::from_text(path, &String::from_utf8_lossy(&bytes))
    }

    /// Picks the relevant lines out of a log's text.
    #[must_use]
    pub fn from_text(path: &Path, text: &str) -> Self {
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| !line.trim().is_empty())
            .filter(|line| !HARMLESS.iter().any(|harmless| line.contains(harmless)))
            .collect();
        let is_error = |line: &str| line.contains("Error (");
        let mut wanted = vec![false; lines.len()];
        for (index, line) in lines.iter().enumerate() {
            if is_error(line) {
                let from = index.saturating_sub(LINES_BEFORE);
                wanted[from..=index].fill(true);
            }
        }
        let mut kept: Vec<String> = lines
            .iter()
            .zip(&wanted)
            .filter(|(_, wanted)| **wanted)
            .map(|(line, _)| (*line).to_owned())
            .collect();
        // The first error is the cause, what follows is mostly its wake.
        kept.truncate(LINES_MAX);
        if kept.is_empty() {
            let from = lines.len().saturating_sub(LINES_MAX);
            kept = lines[from..]
                .iter()
                .map(|line| (*line).to_owned())
                .collect();
        }
        // A page stream that breaks is our own doing, or the wake of an error.
        let first_error = kept
            .iter()
            .filter(|line| is_error(line))
            .min_by_key(|line| line.contains("page-xfer:"))
            .map(|line| bare(line).to_owned());
        Self {
            path: path.to_owned(),
            lines: kept,
            first_error,
        }
    }

    /// Adds what CRIU said elsewhere: on its standard error, before it had a
    /// log, or in its answer.
    pub(crate) fn or_else(mut self, stderr: Vec<String>, message: Option<String>) -> Self {
        let said = message
            .filter(|text| !HARMLESS.iter().any(|harmless| text.contains(harmless)))
            .map(|text| bare(text.trim()).to_owned())
            .filter(|text| !text.is_empty())
            .or_else(|| stderr.last().map(|line| bare(line).to_owned()));
        self.first_error = self.first_error.or(said);
        if self.lines.is_empty() {
            self.lines = stderr;
        }
        self
    }

    /// Where the whole log is, as long as the image directory exists.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The relevant lines, as CRIU wrote them.
    #[must_use]
    pub fn lines(&self) -> &[String] {
        &self.lines
    }

    /// The first error, without time and place.
    #[must_use]
    pub fn summary(&self) -> Option<&str> {
        self.first_error.as_deref()
    }

    /// What to do about it, for causes that are known.
    #[must_use]
    pub fn advice(&self) -> Option<String> {
        // The first error is the cause: its advice goes before that of others.
        self.first_error.iter().chain(&self.lines).find_map(|line| {
            ADVICE
                .iter()
                .find(|(pattern, _)| line.contains(pattern))
                .map(|(_, advice)| (*advice).to_owned())
        })
    }
}

/// The text of a line of the form `(00.001)  12: Error (criu/file.c:34): text`.
fn bare(line: &str) -> &str {
    line.split_once("Error (")
        .and_then(|(_, rest)| rest.split_once("): "))
        .map_or(line, |(_, text)| text)
        .trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
(00.000021) Version: 4.2.1 (gitid 0)
(00.000101) Error (criu/util.c:1525): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted
(00.002000) one
(00.002001) two
(00.002002) Warn  (criu/sk-unix.c:870): Runaway socket: ino 77
(00.002003) Error (criu/sk-unix.c:873): sk unix: External socket is used. Consider using --ext-unix-sk option.
(00.002009) Error (criu/cr-dump.c:1800): Dump files (pid: 12) failed with -1
(00.009999) Error (criu/cr-dump.c:2128): Dumping FAILED.
";

    #[test]
    fn the_cause_is_found_and_the_harmless_skipped() {
        let tail = LogTail::from_text(Path::new("/i/dump.log"), LOG);
        assert_eq!(
            tail.summary(),
            Some("sk unix: External socket is used. Consider using --ext-unix-sk option.")
        );
        assert_eq!(tail.lines().len(), 4, "{:?}", tail.lines());
        assert!(tail.lines()[0].ends_with("two"));
        assert!(tail.advice().unwrap().contains("--stdio"));
    }

    #[test]
    fn a_restore_line_with_a_pid_loses_time_pid_and_place() {
        let tail = LogTail::from_text(
            Path::new("/i/restore.log"),
            "(00.010) 12: Error (criu/cr-restore.c:1230): Can't fork for 12: File exists\n",
        );
        assert_eq!(tail.summary(), Some("Can't fork for 12: File exists"));
        assert!(tail.advice().unwrap().contains("PID"));
    }

    #[test]
    fn without_a_log_what_was_on_stderr_is_kept() {
        let tail = LogTail::read(Path::new("/nonexistent/dump.log"))
            .or_else(vec!["cannot open shared object".into()], None);
        assert_eq!(tail.summary(), Some("cannot open shared object"));
    }

    #[test]
    fn a_long_log_is_cut() {
        let text = "(00.1) Error (criu/x.c:1): Can't dump file 3 of that type\n".repeat(1000);
        let tail = LogTail::from_text(Path::new("l"), &text);
        assert_eq!(tail.lines().len(), LINES_MAX);
    }
}
