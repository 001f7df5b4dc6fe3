//! Comparing both sides before anything freezes.

use serde::{Deserialize, Serialize};

/// Whether a finding stops the migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Checked and fine.
    Ok,
    /// Worth knowing; does not stop the migration.
    Note,
    /// The migration is refused.
    Refused,
}

/// One line of the preflight table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Stops the migration or not.
    pub severity: Severity,
    /// What was looked at: `pid 1234`, `address 10.77.0.100`, `file /usr/bin/x`.
    pub subject: String,
    /// What was found.
    pub finding: String,
    /// What the user can do about it; empty where nothing need be done.
    pub way_out: String,
}

impl Finding {
    /// A check that passed.
    pub fn ok(subject: impl Into<String>, finding: impl Into<String>) -> Self {
        Self::with(Severity::Ok, subject, finding, "")
    }

    /// Something to know.
    pub fn note(
        subject: impl Into<String>,
        finding: impl Into<String>,
        way_out: impl Into<String>,
    ) -> Self {
        Self::with(Severity::Note, subject, finding, way_out)
    }

    /// Something that stops the migration, with a way out.
    pub fn refused(
        subject: impl Into<String>,
        finding: impl Into<String>,
        way_out: impl Into<String>,
    ) -> Self {
        Self::with(Severity::Refused, subject, finding, way_out)
    }

    fn with(
        severity: Severity,
        subject: impl Into<String>,
        finding: impl Into<String>,
        way_out: impl Into<String>,
    ) -> Self {
        Self {
            severity,
            subject: subject.into(),
            finding: finding.into(),
            way_out: way_out.into(),
        }
    }
}

/// Whether any finding stops the migration.
#[must_use]
pub fn refused(findings: &[Finding]) -> bool {
    findings.iter().any(|f| f.severity == Severity::Refused)
}
