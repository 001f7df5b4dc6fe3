//! The two lines of JSON that go through SSH before there is TLS.
//!
//! `protocol` and `release` stay where they are in every release: they are
//! read first, so that another release is named and not called malformed.

use migrate_core::wire::Hello;
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use crate::error::{ChannelError, PeerVersion};

/// The longest line: two certificates of the kind made here would fit ten times.
pub(crate) const LINE_BYTES_MAX: usize = 16 << 10;

/// How the agent's line begins. What a login shell prints before it is skipped.
pub(crate) const MARKER: &[u8] = b"{\"migrate_agent\":";

/// The part of either line that every release understands.
#[derive(Debug, Deserialize)]
struct AnyVersion {
    protocol: u32,
    release: String,
}

/// From the source.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Offer {
    pub(crate) protocol: u32,
    pub(crate) release: String,
    /// DER in hexadecimal digits.
    pub(crate) certificate: String,
}

/// From the agent.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// Makes [`MARKER`]; must be the first field.
    pub(crate) migrate_agent: u32,
    pub(crate) protocol: u32,
    pub(crate) release: String,
    /// Where it listens, best first.
    #[serde(default)]
    pub(crate) addresses: Vec<std::net::SocketAddr>,
    /// DER in hexadecimal digits.
    #[serde(default)]
    pub(crate) certificate: String,
    /// Set instead of the two above when it does not listen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) help: Option<String>,
}

impl Answer {
    pub(crate) fn new(hello: &Hello) -> Self {
        Self {
            migrate_agent: 1,
            protocol: hello.protocol,
            release: hello.release.clone(),
            addresses: Vec::new(),
            certificate: String::new(),
            error: None,
            help: None,
        }
    }
}

/// One line with its end.
pub(crate) fn line(value: &impl Serialize, what: &'static str) -> Result<Vec<u8>, ChannelError> {
    let mut line = serde_json::to_vec(value).map_err(|error| malformed(what, error))?;
    line.push(b'\n');
    Ok(line)
}

/// The version in a line of any release.
pub(crate) fn version(line: &[u8], what: &'static str) -> Result<PeerVersion, ChannelError> {
    let AnyVersion { protocol, release } =
        serde_json::from_slice(line).map_err(|error| malformed(what, error))?;
    Ok(PeerVersion { protocol, release })
}

/// A line of this release.
pub(crate) fn parse<'a, T: Deserialize<'a>>(
    line: &'a [u8],
    what: &'static str,
) -> Result<T, ChannelError> {
    serde_json::from_slice(line).map_err(|error| malformed(what, error))
}

fn malformed(what: &'static str, error: serde_json::Error) -> ChannelError {
    ChannelError::Bootstrap {
        what,
        source: Some(error),
    }
}

pub(crate) fn encode_certificate(certificate: &CertificateDer<'_>) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    certificate
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .map(|nibble| char::from(DIGITS[usize::from(nibble)]))
        .collect()
}

pub(crate) fn decode_certificate(text: &str) -> Result<CertificateDer<'static>, ChannelError> {
    const MALFORMED: ChannelError = ChannelError::Bootstrap {
        what: "one-time certificate",
        source: None,
    };
    let nibble = |digit: u8| char::from(digit).to_digit(16);
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else {
        return Err(MALFORMED);
    };
    if pairs.is_empty() {
        return Err(MALFORMED);
    }
    pairs
        .iter()
        .map(|[high, low]| u8::try_from(nibble(*high)? << 4 | nibble(*low)?).ok())
        .collect::<Option<Vec<u8>>>()
        .map(CertificateDer::from)
        .ok_or(MALFORMED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_marker_is_what_an_answer_begins_with() {
        let hello = Hello {
            protocol: 1,
            release: "0.1.0".into(),
            hostname: "h".into(),
            migration_id: String::new(),
        };
        let line = line(&Answer::new(&hello), "answer").unwrap();
        assert!(line.starts_with(MARKER));
        assert_eq!(line.iter().filter(|b| **b == b'\n').count(), 1);
    }

    #[test]
    fn a_line_of_another_release_still_shows_its_version() {
        let text = br#"{"migrate_agent":9,"later":[1,{"x":2}],"protocol":7,"release":"9.9"}"#;
        let version = version(text, "answer").unwrap();
        assert_eq!((version.protocol, version.release.as_str()), (7, "9.9"));
    }

    proptest! {
        #[test]
        fn certificates_round_trip(der in prop::collection::vec(any::<u8>(), 1..600)) {
            let der = CertificateDer::from(der);
            prop_assert_eq!(decode_certificate(&encode_certificate(&der)).unwrap(), der);
        }

        #[test]
        fn any_line_parses_or_is_refused(text in ".{0,200}") {
            let _ = decode_certificate(&text);
            let _ = version(text.as_bytes(), "line");
            let _ = parse::<Answer>(text.as_bytes(), "line");
            let _ = parse::<Offer>(text.as_bytes(), "line");
        }
    }
}
