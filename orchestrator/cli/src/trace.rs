//! A report in the format of Chrome's tracing, which Perfetto and
//! `chrome://tracing` show: both hosts on the source's clock.

use std::path::Path;

use migrate_core::report::Report;
use migrate_session::{Error, reports};
use serde_json::{Value, json};

/// Lanes are processes and threads in that format; these are ours.
const SOURCE: u32 = 1;
const DESTINATION: u32 = 2;
const PHASES: u32 = 1;
const ROUNDS: u32 = 2;
const BLACKOUT: u32 = 3;

/// Writes the trace.
///
/// # Errors
///
/// The file cannot be written.
pub fn write(path: &Path, report: &Report) -> Result<(), Error> {
    reports::write_text(path, &trace(report).to_string())
}

fn trace(report: &Report) -> Value {
    let named = |what: &str, pid: u32, tid: u32, name: String| json!({"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}});
    let mut events = vec![
        named(
            "process_name",
            SOURCE,
            PHASES,
            format!("source {}", report.source),
        ),
        named("thread_name", SOURCE, PHASES, "phases".into()),
        named("thread_name", SOURCE, ROUNDS, "rounds".into()),
        named("thread_name", SOURCE, BLACKOUT, "blackout".into()),
    ];
    let event = |name: &str, pid: u32, tid: u32, start_us: i64, took_us: u64, args: Value| {
        json!({"ph": "X", "cat": "migrate", "name": name, "pid": pid, "tid": tid,
               "ts": start_us, "dur": took_us, "args": args})
    };
    // Within its phase a part is drawn below it.
    for span in report.phases.iter().chain(&report.source_parts) {
        events.push(event(
            &span.name,
            SOURCE,
            PHASES,
            span.start_us,
            span.took_us,
            json!({}),
        ));
    }
    for round in &report.precopy {
        let (name, start_us) = (
            format!("round {}", round.round),
            round.start_us.cast_signed(),
        );
        let args = serde_json::to_value(round).unwrap_or_default();
        events.push(event(&name, SOURCE, ROUNDS, start_us, round.took_us, args));
    }
    if let Some(start_us) = report.blackout_start_us {
        let mut at_us = start_us.cast_signed();
        for (name, took_us) in report.blackout.parts() {
            events.push(event(name, SOURCE, BLACKOUT, at_us, took_us, json!({})));
            at_us = at_us.saturating_add_unsigned(took_us);
        }
    }
    if !report.destination_steps.is_empty() {
        let host = format!("destination {}", report.destination);
        events.push(named("process_name", DESTINATION, PHASES, host));
        events.push(named("thread_name", DESTINATION, PHASES, "steps".into()));
    }
    for span in report
        .destination_steps
        .iter()
        .chain(&report.destination_parts)
    {
        let (start_us, took_us) = (span.start_us, span.took_us);
        events.push(event(
            &span.name,
            DESTINATION,
            PHASES,
            start_us,
            took_us,
            json!({}),
        ));
    }
    json!({
        "displayTimeUnit": "ms",
        "otherData": {
            "migration_id": report.migration_id,
            "began_unix_ms": report.began_unix_ms,
            "clock_error_us": report.clock_error_us,
        },
        "traceEvents": events,
    })
}
