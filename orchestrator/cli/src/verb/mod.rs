//! One file per verb.

pub mod adopt;
pub mod agent;
pub mod cancel;
pub mod check;
pub mod guard_boot;
pub mod keep_memory;
pub mod maintenance;
pub mod manual;
pub mod mark;
pub mod migrate;
pub mod park;
pub mod recover;
pub mod report;
pub mod resume;
pub mod status;
pub mod unlock;

use std::path::PathBuf;

use migrate_channel::{ChannelError, Destination, TlsFiles};

/// Certificates for a standing agent.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Certificates {
    /// Authority that both sides' certificates come from (PEM)
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// This side's certificate (PEM)
    #[arg(long, value_name = "FILE")]
    pub cert: Option<PathBuf>,
    /// Its key (PEM)
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
}

impl Certificates {
    /// All three, or none.
    ///
    /// # Errors
    ///
    /// Some are missing; the text names them.
    pub fn complete(&self) -> Result<Option<TlsFiles>, String> {
        match (&self.ca, &self.cert, &self.key) {
            (None, None, None) => Ok(None),
            (Some(ca), Some(cert), Some(key)) => Ok(Some(TlsFiles {
                ca: ca.clone(),
                cert: cert.clone(),
                key: key.clone(),
            })),
            _ => {
                let missing: Vec<&str> = [
                    ("--ca", &self.ca),
                    ("--cert", &self.cert),
                    ("--key", &self.key),
                ]
                .into_iter()
                .filter_map(|(name, value)| value.is_none().then_some(name))
                .collect();
                Err(format!(
                    "--ca, --cert and --key belong together; {} missing\nhelp: give all three for a standing agent, or none to go by SSH",
                    missing.join(" and ")
                ))
            }
        }
    }
}

/// Whether a record is of the tree or the migration that a user has named.
pub fn is_named(record: &migrate_core::journal::Record, name: &str) -> bool {
    record.migration_id == name || name.parse() == Ok(record.root_pid)
}

/// `--to` and its certificates as a record keeps them, to be read in another
/// directory.
pub fn route(to: &str, certificates: &Certificates) -> migrate_core::journal::Route {
    let absolute = |file: &Option<PathBuf>| {
        let file = std::path::absolute(file.as_ref()?).ok()?;
        Some(file.to_string_lossy().into_owned())
    };
    let all = [&certificates.ca, &certificates.cert, &certificates.key].map(absolute);
    let certificates = match all {
        [Some(ca), Some(cert), Some(key)] => Some([ca, cert, key]),
        _ => None,
    };
    migrate_core::journal::Route {
        to: to.to_owned(),
        certificates,
    }
}

/// Reads `--to`.
///
/// # Errors
///
/// A text for the user.
pub fn destination(to: &str, certificates: &Certificates) -> Result<Destination, String> {
    let files = certificates.complete()?;
    Destination::parse(to, files).map_err(|error: ChannelError| {
        let text = migrate_session::error::chain(&error);
        match error.help() {
            Some(help) => format!("{text}\nhelp: {help}"),
            None => text,
        }
    })
}
