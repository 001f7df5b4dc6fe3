//! One file per verb.

pub mod agent;
pub mod check;
pub mod migrate;
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
