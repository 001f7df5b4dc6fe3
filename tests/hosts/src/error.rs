//! What can go wrong with a lab, and the way out.

use std::io;
use std::time::Duration;

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An attempt that failed, with its object.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The caller has not the rights to make namespaces.
    #[error("test hosts need root")]
    NotRoot,
    /// The name of a lab is not a plain word.
    #[error("`{name}` cannot name a lab")]
    BadLabName {
        /// The name as it was given.
        name: String,
    },
    /// There is no host of this name in a lab.
    #[error("no test host is named `{name}`")]
    UnknownHost {
        /// The name as it was given.
        name: String,
    },
    /// The lab is not up, or only in part.
    #[error("the test hosts of lab `{lab}` are not up")]
    NotUp {
        /// The lab's name.
        lab: String,
    },
    /// A program of the machine is missing.
    #[error("could not find the program `{program}`")]
    MissingProgram {
        /// Its name or path.
        program: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// A program of the machine failed.
    #[error("`{command}` failed ({status}): {message}")]
    Program {
        /// The command line.
        command: String,
        /// How it ended.
        status: String,
        /// The end of what it said.
        message: String,
    },
    /// A host did not come up.
    #[error("could not start `{member}` of lab `{lab}`: {message}")]
    Start {
        /// The lab's name.
        lab: String,
        /// The host's name, or `switch`.
        member: &'static str,
        /// What its init reported.
        message: String,
    },
    /// Something was still there when its time was over.
    #[error("could not see {what} within {limit:?}")]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long.
        limit: Duration,
    },
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
            Self::NotRoot => Some("run it as root, for example with `sudo`".to_owned()),
            Self::BadLabName { .. } => {
                Some("use 1 to 32 of the characters a-z, 0-9 and `-`".to_owned())
            }
            Self::UnknownHost { .. } => Some("the hosts are host1, host2 and client".to_owned()),
            Self::NotUp { lab } => {
                Some(format!("bring them up with `scripts/hosts up --lab {lab}`"))
            }
            Self::MissingProgram { package, .. } => {
                Some(format!("install it with `apt-get install {package}`"))
            }
            Self::Start { lab, .. } => Some(format!(
                "clear the rest with `scripts/hosts down --lab {lab}` and try again"
            )),
            Self::Program { .. } | Self::Deadline { .. } | Self::System { .. } => None,
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
