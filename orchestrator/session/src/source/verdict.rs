//! The question who owns the tree, and its answer, which binds.

use std::path::PathBuf;
use std::time::Duration;

use migrate_channel::{Destination, TlsFiles};
use migrate_core::journal::{Route, Stage};
use migrate_core::wire::Message;

use super::preflight::connect;
use super::{Link, STEP_LIMIT};
use crate::error::Error;
use crate::progress::Reporter;

/// Between two questions about the same tree.
pub(crate) const PAUSE: Duration = Duration::from_secs(1);

/// The destination on record.
///
/// # Errors
///
/// The record names none that can be understood.
pub(crate) fn destination(route: &Route) -> Result<Destination, Error> {
    let files = route.certificates.as_ref().map(|[ca, cert, key]| TlsFiles {
        ca: PathBuf::from(ca),
        cert: PathBuf::from(cert),
        key: PathBuf::from(key),
    });
    Destination::parse(&route.to, files).map_err(Error::Connect)
}

/// Asks once, over a connection of its own.
///
/// # Errors
///
/// The destination cannot be reached, or another host answers.
pub(crate) async fn ask(
    destination: &Destination,
    id: &str,
    peer: &str,
    reporter: &Reporter,
) -> Result<(Link, Stage), Error> {
    const AWAITED: &str = "the destination's verdict";
    let mut link = connect(destination, id, reporter).await?;
    // Another host knows nothing of the tree, which is no answer.
    if link.peer != peer {
        return Err(Error::Changed(format!("{} answers for {peer}", link.peer)));
    }
    let question = Message::Verdict {
        migration_id: id.to_owned(),
    };
    link.sender
        .control(&question)
        .await
        .map_err(Error::Connect)?;
    match link.inbox.next_within(AWAITED, STEP_LIMIT).await? {
        Message::VerdictIs(stage) => Ok((link, stage)),
        other => Err(link.inbox.unexpected(&other, AWAITED)),
    }
}
