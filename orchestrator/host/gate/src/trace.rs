//! The programs' own words, for debugging: one line per dropped packet.

use std::sync::{Mutex, PoisonError};

use aya::Ebpf;
use aya_log::EbpfLogger;

/// The tracing target that turns them on.
const TARGET: &str = "migrate_gate::packets";

/// The level that the programs are loaded with: everything, or nothing, in
/// which case the verifier removes the code.
pub(crate) fn level() -> u8 {
    if tracing::enabled!(target: TARGET, tracing::Level::TRACE) {
        u8::MAX
    } else {
        0
    }
}

/// The reading end of the programs' ring buffer, if they write to it.
#[derive(Default)]
pub(crate) struct Trace(Option<Mutex<EbpfLogger<ToTracing>>>);

impl Trace {
    pub(crate) fn read(ebpf: &mut Ebpf) -> Self {
        if level() == 0 {
            return Self(None);
        }
        match EbpfLogger::init_with_logger(ebpf, ToTracing) {
            Ok(logger) => Self(Some(Mutex::new(logger))),
            Err(error) => {
                // The gate works without it.
                tracing::warn!(%error, "no trace of the gate's programs");
                Self(None)
            }
        }
    }

    /// Hands on what has gathered. What the ring had no room for is lost, the
    /// counters are not.
    pub(crate) fn flush(&self) {
        if let Some(logger) = &self.0 {
            logger
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .flush();
        }
    }
}

impl std::fmt::Debug for Trace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Trace").field(&self.0.is_some()).finish()
    }
}

/// aya-log speaks `log`, the rest of this program `tracing`.
struct ToTracing;

impl log::Log for ToTracing {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        tracing::trace!(target: TARGET, "{}", record.args());
    }

    fn flush(&self) {}
}
