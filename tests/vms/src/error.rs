//! What can go wrong with a virtual machine, and the way out.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An attempt that failed, with its object.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No kernel of this series has been fetched.
    #[error("kernel {series} is not in {}", path.display())]
    NoKernel {
        /// As `scripts/vms` names it.
        series: &'static str,
        /// Where it would be.
        path: PathBuf,
    },
    /// There is no kernel of this name.
    #[error("`{name}` is no kernel series")]
    UnknownKernel {
        /// The name as it was given.
        name: String,
    },
    /// A program of the machine is missing.
    #[error("could not find the program `{program}`")]
    MissingProgram {
        /// Its name or path.
        program: String,
    },
    /// A program of the machine failed.
    #[error("`{command}` failed: {message}")]
    Program {
        /// The command.
        command: String,
        /// The end of what it said.
        message: String,
    },
    /// There is nothing that the machine could go on with.
    #[error("{host} has no disk with another kernel")]
    NoDisk {
        /// Which.
        host: &'static str,
    },
    /// A machine did not come up, or died.
    #[error("{host}, kernel {series}: {verdict}; its console is in {}", console.display())]
    Machine {
        /// Which.
        host: &'static str,
        /// Its kernel.
        series: &'static str,
        /// The line that tells.
        verdict: String,
        /// All that it printed.
        console: PathBuf,
    },
    /// A command in a machine was not done in time.
    #[error("`{command}` on {host} did not end within {limit:?}; it said: {said}")]
    Deadline {
        /// Where.
        host: &'static str,
        /// The command line.
        command: String,
        /// How long.
        limit: Duration,
        /// The end of its output.
        said: String,
    },
    /// A command in a machine failed that must not.
    #[error("`{command}` on {host} ended with {code:?}: {said}")]
    Command {
        /// Where.
        host: &'static str,
        /// The command line.
        command: String,
        /// Its exit code.
        code: Option<i32>,
        /// The end of its output.
        said: String,
    },
    /// The keys of the machines could not be made.
    #[error("could not make the machines' keys")]
    Keys(#[source] migrate_test_hosts::Error),
    /// A call to the system failed.
    #[error("could not {attempt}")]
    System {
        /// The attempt, as an infinitive.
        attempt: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// The way out, where there is one.
    #[must_use]
    pub fn help(&self) -> Option<String> {
        match self {
            Self::NoKernel { series, .. } => Some(format!("fetch it with `scripts/vms {series}`")),
            Self::UnknownKernel { .. } => Some("take 6.1, 6.12 or newest".to_owned()),
            Self::MissingProgram { .. } => Some("run scripts/setup".to_owned()),
            Self::NoDisk { .. } => Some("order it with_disk".to_owned()),
            _ => None,
        }
    }

    /// The message with all its causes, joined by colons.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

/// Turns the system's refusal of `attempt` into an [`Error`].
pub(crate) trait Attempt<T> {
    /// `attempt` is an infinitive, such as `mount /proc`.
    fn attempt(self, attempt: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Attempt<T> for std::result::Result<T, E> {
    fn attempt(self, attempt: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::System {
            attempt: attempt(),
            source: error.into(),
        })
    }
}
