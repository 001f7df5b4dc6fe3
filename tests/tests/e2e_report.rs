//! What a migration shows on a terminal, and what it leaves to read: the report, a
//! page that a real browser draws, a trace.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};

use migrate_core::Phase;
use migrate_core::report::Report;
use migrate_core::timeline::Span;
use migrate_test_hosts::{Host, HostName, Lab};
use migrate_tests::migration::{print_logs, serves_old_connections};
use migrate_tests::refusals::{Running, runner};
use migrate_tests::require;
use migrate_tests::workload::{Kind, Workload};
use nix::errno::Errno;
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

const COLUMNS: u16 = 80;

/// Runs a command on a terminal to its end: exit code, and all that was written.
fn on_terminal(mut command: Command) -> (Option<i32>, String) {
    let size = Winsize {
        ws_row: 24,
        ws_col: COLUMNS,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let OpenptyResult { master, slave } = openpty(&size, None).unwrap();
    let end = |slave: &OwnedFd| Stdio::from(slave.try_clone().unwrap());
    command.stdin(end(&slave)).stdout(end(&slave));
    command.stderr(end(&slave)).env("TERM", "xterm");
    let mut child = command.spawn().unwrap();
    // The master ends with the last process that has the other end.
    drop((command, slave));
    let mut master = File::from(master);
    let (mut said, mut some) = (Vec::new(), [0; 4096]);
    loop {
        match master.read(&mut some) {
            Ok(0) => break,
            Ok(read) => said.extend_from_slice(&some[..read]),
            Err(error) if error.raw_os_error() == Some(Errno::EIO as i32) => break,
            Err(error) => panic!("reading the terminal: {error}"),
        }
    }
    let code = child.wait().unwrap().code();
    (code, String::from_utf8_lossy(&said).into_owned())
}

/// What stood in lines of its own.
fn split(said: &str) -> Vec<String> {
    let plain = console::strip_ansi_codes(said);
    let lines = plain.split(['\n', '\r']);
    lines
        .map(|line| line.trim_end().to_owned())
        .filter(|line| !line.is_empty())
        .collect()
}

/// The same, each no wider than the terminal.
fn lines(said: &str) -> Vec<String> {
    let lines = split(said);
    fit(&lines);
    lines
}

#[track_caller]
fn fit(lines: &[String]) {
    for line in lines {
        assert!(line.chars().count() <= COLUMNS.into(), "too wide: {line:?}");
    }
}

/// Whether text is coloured or bold anywhere.
fn is_painted(said: &str) -> bool {
    said.split("\x1b[").skip(1).any(|sequence| {
        let end = sequence.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';');
        end.starts_with('m')
    })
}

fn run(host: &Host, arguments: &[&str]) -> String {
    let output = host.exec([&["migrate"], arguments].concat()).unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The browser's standard output.
fn browse(profile: &Path, options: &[&str], page: &Path) -> String {
    let output = Command::new("timeout")
        .args(["240", "chromium-headless-shell", "--no-sandbox"])
        .args(["--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
        .arg(format!("--user-data-dir={}", profile.display()))
        .args(options)
        .arg(format!("file://{}", page.display()))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The part of a document that is the chart of this name.
fn chart<'a>(document: &'a str, id: &str) -> &'a str {
    let from = document.find(&format!("<svg id=\"{id}\""));
    let from = from.unwrap_or_else(|| panic!("no chart {id}: {document}"));
    let to = document[from..].find("</svg>").unwrap();
    &document[from..from + to]
}

fn named<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    let span = spans.iter().find(|span| span.name == name);
    span.unwrap_or_else(|| panic!("no {name}: {spans:#?}"))
}

/// Pixels of about this colour.
fn pixels(png: &Path, colour: [u8; 3]) -> usize {
    let decoder = png::Decoder::new(BufReader::new(File::open(png).unwrap()));
    let mut reader = decoder.read_info().unwrap();
    let mut image = vec![0; reader.output_buffer_size().unwrap()];
    let frame = reader.next_frame(&mut image).unwrap();
    assert_eq!(frame.bit_depth, png::BitDepth::Eight);
    image
        .chunks_exact(frame.color_type.samples())
        .filter(|pixel| pixel.iter().zip(colour).all(|(a, b)| a.abs_diff(b) < 8))
        .count()
}

#[test]
fn a_round_is_shown_while_it_lasts_here_and_to_who_watches() {
    require!("a_round_is_shown_while_it_lasts_here_and_to_who_watches": root, tcx, criu, migrate, redis);
    let lab = Lab::scoped(&format!("watch-{}", std::process::id())).unwrap();
    let workload = Workload::start(Kind::Redis, &lab).unwrap();
    let host1 = lab.host(HostName::Host1);
    let pid = workload.pid.to_string();
    let mut watch = host1.command("migrate");
    watch.args(["status", "--json", "--watch", "0.1"]);
    let mut watch = Running::start(watch);

    let mut command = host1.command("migrate");
    // A first round of seconds, with a log of it.
    command.args(["--bandwidth", "2M", "--compress", "none", "-vv"]);
    command.args(["--to", "host2", &pid]);
    let (code, said) = on_terminal(command);
    assert_eq!(code, Some(0), "{said}");
    let (log, shown): (Vec<String>, Vec<String>) = split(&said).into_iter().partition(|line| {
        [" DEBUG ", " INFO ", " WARN "]
            .iter()
            .any(|level| line.contains(level))
    });
    fit(&shown);
    let of_round = log.iter().filter(|line| line.contains("Sending"));
    assert!(of_round.count() >= 2, "{log:#?}");
    // None of it begins behind the line of the round.
    let runs_on = log.iter().find(|line| !line.starts_with("20"));
    assert_eq!(runs_on, None, "{said:?}");
    let grows = shown.iter().filter(|line| {
        let bar = line.split_whitespace().nth(1).unwrap_or_default();
        line.starts_with("    1  ") && bar.len() == 10 && bar.contains('>')
    });
    assert!(grows.count() >= 2, "{shown:#?}");
    // In the place of each other, and gone in the end.
    assert!(said.contains('\r'), "{said:?}");

    let runs = |line: &Value| line["owner_alive"] == true && line["flows"].is_u64();
    assert!(watch.await_event(|line| runs(line) && line["phase"] == "precopy"));
    assert!(watch.await_event(|line| runs(line) && line["rounds"].as_u64() >= Some(1)));
    kill(runner(&host1, "status"), Signal::SIGINT).unwrap();
    let ended = watch.finish();
    assert_eq!(ended.status.code(), Some(0), "{ended:#?}");
}

#[test]
fn a_migration_is_shown_as_it_happens_and_can_be_read_afterwards() {
    require!("a_migration_is_shown_as_it_happens_and_can_be_read_afterwards": root, tcx, criu, migrate, chromium);
    let lab = Lab::scoped(&format!("report-{}", std::process::id())).unwrap();
    let workload = Workload::start(Kind::Echo, &lab).unwrap();
    let mut client = workload.client(&lab, 5, &[]).unwrap();
    let (host1, host2) = (lab.host(HostName::Host1), lab.host(HostName::Host2));
    let pid = workload.pid.to_string();

    // The table of a check, in colour, but not for a program.
    let check = || {
        let mut command = host1.command("migrate");
        command.args(["check", "--to", "host2", &pid]);
        command.env_remove("NO_COLOR");
        command
    };
    let (code, said) = on_terminal(check());
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("\x1b[32mok"), "{said}");
    let piped = check().output().unwrap();
    assert_eq!(piped.status.code(), Some(0), "{piped:?}");
    let text = String::from_utf8_lossy(&piped.stdout);
    assert!(text.contains("  ok ") && !text.contains('\x1b'), "{text:?}");
    assert!(
        lines(&said).last().unwrap().starts_with("can be moved"),
        "{said}"
    );

    // The move itself, without.
    serves_old_connections(&mut client);
    let mut command = host1.command("migrate");
    command.args(["--report", "/run/report.json", "--trace", "/run/trace.json"]);
    command.args(["--to", "host2", &pid]).env("NO_COLOR", "1");
    let (code, said) = on_terminal(command);
    if code != Some(0) {
        print_logs(&host1);
        print_logs(&host2);
    }
    assert_eq!(code, Some(0), "{said}");
    assert!(!is_painted(&said), "{said:?}");
    let shown = lines(&said);
    let has = |words: &str| shown.iter().any(|line| line.contains(words));
    for words in [
        "  precopy ",
        "round  unchanged ",
        "    1      -",
        " MiB/s ",
        "  blackout     ",
    ] {
        assert!(has(words), "{words:?}: {shown:#?}");
    }
    let last = format!("process {pid} (echo-server) runs on host2");
    assert_eq!(shown.last(), Some(&last), "{shown:#?}");
    serves_old_connections(&mut client);

    // The report: the same in the file and as this host keeps it.
    let report: Report =
        serde_json::from_slice(&fs::read(host1.path("/run/report.json")).unwrap()).unwrap();
    let kept: Report = serde_json::from_str(&run(&host1, &["report", "--json"])).unwrap();
    assert_eq!(kept, report);
    assert_eq!(report.outcome, Phase::Committed);
    assert_eq!(report.precopy.len(), report.rounds as usize);
    let names: Vec<&str> = report
        .phases
        .iter()
        .map(|span| span.name.as_str())
        .collect();
    let phases = Phase::ALL.iter().filter(|phase| **phase <= Phase::Finish);
    assert_eq!(names, phases.map(|phase| phase.name()).collect::<Vec<_>>());
    // Each host's own order, and the order of both where messages make it.
    let error_us = report.clock_error_us.unwrap().cast_signed();
    for spans in [&report.phases, &report.destination_steps] {
        for pair in spans.windows(2) {
            assert!(pair[0].end_us() <= pair[1].start_us + 1, "{pair:?}");
        }
    }
    // Parts lie within what they are parts of.
    for (part, of, spans) in [
        ("criu_freezes", "freeze", &report.phases),
        ("last_look", "freeze", &report.phases),
        ("criu_dumps", "dump", &report.phases),
        ("images_sent", "dump", &report.phases),
        ("keeper_ordered", "receive", &report.destination_steps),
        ("criu_released", "restore", &report.destination_steps),
        ("criu_builds_copy", "restore", &report.destination_steps),
        ("criu_ends_repair", "resume", &report.destination_steps),
        ("held_given_back", "resume", &report.destination_steps),
    ] {
        let parts = [&report.source_parts[..], &report.destination_parts].concat();
        let (part, whole) = (named(&parts, part), named(spans, of));
        assert!(
            whole.start_us <= part.start_us && part.end_us() <= whole.end_us() + 1,
            "{part:?} in {whole:?}"
        );
    }
    let (steps, handover) = (&report.destination_steps, named(&report.phases, "handover"));
    assert!(
        named(steps, "restore").end_us() <= handover.end_us() + error_us,
        "{report:#?}"
    );
    assert!(
        named(steps, "own").start_us + error_us >= handover.start_us,
        "{report:#?}"
    );
    assert!(named(steps, "resume").end_us() <= report.total_us.cast_signed() + error_us);
    assert!(run(&host1, &["report", &report.migration_id]).contains("  blackout     "));

    // On a terminal all of it fits, however large.
    let mut large = report.clone();
    (large.pages, large.bytes) = (1_048_576, 4 << 30);
    for round in &mut large.precopy {
        (round.pages_scanned, round.pages_written) = (1_048_576, 1_048_576);
        (round.flows, round.dirty_flows) = (Some(10_000), Some(10_000));
    }
    let text = serde_json::to_vec(&large).unwrap();
    fs::write(host1.path("/run/large.json"), text).unwrap();
    let mut command = host1.command("migrate");
    command.args(["report", "/run/large.json"]);
    let (code, said) = on_terminal(command);
    assert_eq!(code, Some(0), "{said}");
    let piped = run(&host1, &["report", "/run/large.json"]);
    assert!(!piped.contains('\x1b'), "{piped:?}");
    let shown = lines(&said).join(" ");
    assert!(
        shown.split_whitespace().eq(piped.split_whitespace()),
        "{shown}"
    );

    // The trace: both hosts.
    let trace: Value =
        serde_json::from_slice(&fs::read(host1.path("/run/trace.json")).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let parts = report.source_parts.len() + report.destination_parts.len();
    let spans = report.phases.len() + steps.len() + parts + report.precopy.len() + 5;
    let complete: Vec<&Value> = events.iter().filter(|event| event["ph"] == "X").collect();
    assert_eq!(complete.len(), spans);
    assert!(
        complete
            .iter()
            .all(|event| event["ts"].is_i64() && event["dur"].is_u64())
    );
    assert!(
        complete
            .iter()
            .any(|event| event["pid"] == 2 && event["name"] == "restore")
    );

    // The page, as a browser understands it.
    let scratch = tempfile::tempdir().unwrap();
    let (profile, page) = (
        scratch.path().join("profile"),
        scratch.path().join("page.html"),
    );
    run(
        &host1,
        &["report", "/run/report.json", "--html", "/run/page.html"],
    );
    fs::copy(host1.path("/run/page.html"), &page).unwrap();
    let document = browse(&profile, &["--dump-dom"], &page);
    let bars = |id| chart(&document, id).matches("<rect ").count();
    assert_eq!(bars("timeline"), spans - parts);
    let table = &document[document.find("id=\"parts\"").unwrap()..];
    let table = &table[..table.find("</table>").unwrap()];
    assert_eq!(table.matches("<tr>").count(), 1 + parts, "{table}");
    assert!(bars("blackout") >= 5 + 4, "{document}");
    assert_eq!(bars("rounds"), 2 * report.precopy.len());
    // All peers who were answered before the destination told what it saw.
    let heard = report.continuity.as_ref().unwrap().worst.iter();
    let heard = heard.filter(|flow| flow.silence_us.is_some()).count();
    assert!((1..=5).contains(&heard), "{report:#?}");
    assert_eq!(bars("silence"), heard);
    let picture = scratch.path().join("page.png");
    let option = format!("--screenshot={}", picture.display());
    browse(&profile, &["--window-size=1000,2600", &option], &page);
    for (what, colour) in [
        ("the source", [0x3b, 0x76, 0xc4]),
        ("the destination", [0x2f, 0x8f, 0x6b]),
        ("the blackout", [0xc8, 0x45, 0x3b]),
    ] {
        let painted = pixels(&picture, colour);
        assert!(painted > 500, "{painted} pixels of {what}");
    }

    // Names come from outside.
    let hostile = "</title><script>document.title = 'taken'</script><img src=x>";
    let mut forged = serde_json::to_value(&report).unwrap();
    for field in ["name", "source", "destination", "migration_id"] {
        forged[field] = json!(hostile);
    }
    fs::write(host1.path("/run/forged.json"), forged.to_string()).unwrap();
    run(
        &host1,
        &["report", "/run/forged.json", "--html", "/run/page.html"],
    );
    fs::copy(host1.path("/run/page.html"), &page).unwrap();
    let document = browse(&profile, &["--dump-dom"], &page);
    assert!(
        document.contains("&lt;/title&gt;&lt;script&gt;"),
        "{document}"
    );
    assert!(
        !document.contains("<script") && !document.contains("<img"),
        "{document}"
    );
    assert!(chart(&document, "timeline").contains("&lt;img src=x&gt;"));

    // And back, in silence; but one who is refused is told.
    let quiet = |host: &Host, to: &str, pid: &str| {
        let mut command = host.command("migrate");
        command.args(["-q", "--to", to, pid]);
        on_terminal(command)
    };
    assert_eq!(quiet(&host2, "host1", &pid), (Some(0), String::new()));
    serves_old_connections(&mut client);
    let (code, said) = quiet(&host2, "host1", &pid);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.starts_with("migrate: "), "{said}");

    let verdict = client.stop().unwrap();
    assert!(verdict.is_clean(), "{verdict:?}");
}
