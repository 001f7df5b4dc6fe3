//! What a migration tells the one who watches it.

use migrate_core::Phase;
use migrate_core::preflight::Finding;
use migrate_core::report::{Report, RoundReport};
use serde::Serialize;
use tokio::sync::mpsc;

/// Something worth showing; also a line of `--json`.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Progress {
    /// The connection to the destination stands.
    Connected {
        /// The migration's id.
        migration_id: String,
        /// `uname -n` of the destination.
        destination: String,
    },
    /// One line of the preflight table.
    Finding {
        /// The finding.
        #[serde(flatten)]
        finding: Finding,
    },
    /// A phase begins.
    Started {
        /// Which.
        phase: Phase,
    },
    /// Pages of a round have gone over; told now and then.
    Sending {
        /// The round's number, from 1.
        round: u32,
        /// Pages so far.
        pages: u64,
        /// Pages that there are to look at, as far as it is known.
        pages_expected: u64,
    },
    /// A round of pre-copy ended.
    Round {
        /// The round.
        #[serde(flatten)]
        round: RoundReport,
    },
    /// A phase ended well.
    Ended {
        /// Which.
        phase: Phase,
        /// How long it took, in microseconds.
        took_us: u64,
        /// One line for a person; empty when there is nothing to say.
        detail: String,
    },
    /// A phase failed; what follows is the way back.
    Failed {
        /// Which.
        phase: Phase,
        /// The chain of causes.
        error: String,
    },
    /// Something that went wrong while undoing, or after the commit.
    Warning {
        /// What.
        text: String,
    },
    /// The closing block.
    Report {
        /// The report.
        #[serde(flatten)]
        report: Box<Report>,
    },
}

/// Where progress goes. Never blocks the migration: what the watcher does not
/// take in time is dropped.
#[derive(Debug, Clone)]
pub struct Reporter {
    sender: Option<mpsc::Sender<Progress>>,
}

impl Reporter {
    /// Room for more events than one migration makes.
    const BACKLOG: usize = 4096;

    /// A reporter and the end to read from.
    #[must_use]
    pub fn channel() -> (Self, mpsc::Receiver<Progress>) {
        let (sender, receiver) = mpsc::channel(Self::BACKLOG);
        (
            Self {
                sender: Some(sender),
            },
            receiver,
        )
    }

    /// A reporter that nobody listens to.
    #[must_use]
    pub fn silent() -> Self {
        Self { sender: None }
    }

    /// Tells.
    pub fn tell(&self, progress: Progress) {
        tracing::debug!(?progress);
        if let Some(sender) = &self.sender
            && sender.try_send(progress).is_err()
        {
            tracing::warn!("a progress event was dropped");
        }
    }

    /// Tells several findings.
    pub fn findings(&self, findings: &[Finding]) {
        for finding in findings {
            self.tell(Progress::Finding {
                finding: finding.clone(),
            });
        }
    }

    /// Tells a warning.
    pub fn warn(&self, text: impl Into<String>) {
        self.tell(Progress::Warning { text: text.into() });
    }
}
