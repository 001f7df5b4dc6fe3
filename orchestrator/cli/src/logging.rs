//! Where the log goes: standard error for a person, a file for an agent whose
//! standard error ends with the SSH session.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::sync::Mutex;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

use crate::Output;
use crate::live::aside;

/// Logs of agents that are kept.
const AGENT_LOGS_MAX: usize = 32;

pub fn start(output: &Output, agent: bool) {
    let level = match (output.verbose, agent) {
        (0, false) => "error",
        (0, true) | (1, _) => "info",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_env("MIGRATE_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_span_events(FmtSpan::NONE)
        .with_ansi(false);
    if agent && let Some(file) = agent_log() {
        builder.with_writer(Mutex::new(file)).init();
    } else {
        builder.with_writer(|| Log).init();
    }
}

/// Standard error, where there may be a live line below. It gets whole lines.
struct Log;

impl Write for Log {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        aside(|| io::stderr().lock().write_all(lines))?;
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

fn agent_log() -> Option<std::fs::File> {
    let directory = migrate_session::State::open().ok()?.log();
    let mut logs: Vec<_> = std::fs::read_dir(&directory)
        .ok()?
        .filter_map(|entry| {
            let entry = entry.ok()?;
            Some((entry.metadata().ok()?.modified().ok()?, entry.path()))
        })
        .collect();
    logs.sort();
    let surplus = (logs.len() + 1).saturating_sub(AGENT_LOGS_MAX);
    for (_, path) in logs.iter().take(surplus) {
        let _ = std::fs::remove_file(path);
    }
    let path = directory.join(format!("agent-{}.log", std::process::id()));
    OpenOptions::new().create(true).append(true).open(path).ok()
}
