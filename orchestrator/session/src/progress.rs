//! What a migration tells the one who watches it.

use migrate_core::Phase;
use migrate_core::convergence::StopReason;
use migrate_core::preflight::Finding;
use migrate_core::report::Report;
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
    /// A round of pre-copy ended.
    Round {
        /// Its number, from 1.
        round: u32,
        /// Populated pages looked at.
        pages_scanned: u64,
        /// Pages that had changed and were sent.
        pages_written: u64,
        /// Pages that had not changed.
        pages_skipped: u64,
        /// Share of pages that had not changed, in percent.
        skipped_percent: u8,
        /// Bytes of pages sent.
        bytes: u64,
        /// How long it took, in microseconds.
        took_us: u64,
        /// Bytes that change in a second, once that is known.
        dirty_bytes_per_s: Option<u64>,
        /// Measured rate of the page stream, in bytes per second.
        link_bytes_per_s: u64,
        /// Connections that the gate knows; none where there is no gate.
        flows: Option<usize>,
        /// Those of them that had traffic in this round.
        dirty_flows: Option<usize>,
        /// How long the blackout would be now, in microseconds, once that is known.
        blackout_us_predicted: Option<u64>,
        /// Why this was the last round.
        stopped: Option<StopReason>,
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
