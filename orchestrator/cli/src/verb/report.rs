//! `migrate report`: what a migration has left to read.

use std::path::{Path, PathBuf};

use migrate_core::report::Report;
use migrate_session::{Error, State, reports};

use crate::exit::Exit;
use crate::show::{Show, complain};
use crate::{Output, page, trace};

/// Which report, and how it is shown.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A file, the id of a migration that began here, or `last`
    #[arg(value_name = "FILE|ID|last", default_value = "last")]
    pub which: String,
    /// Write one page with charts that needs nothing else
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Write what chrome://tracing and Perfetto show
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
}

/// Where else a migration leaves its report.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Keep {
    /// Write the report to this file, too; this host keeps the last 100 anyway (see
    /// `migrate report`)
    #[arg(long, value_name = "FILE", value_parser = writable)]
    pub report: Option<PathBuf>,
    /// Write what each host did when, for chrome://tracing and Perfetto
    #[arg(long, value_name = "FILE", value_parser = writable)]
    pub trace: Option<PathBuf>,
}

/// A file that is to be written when all is over had better have a place.
fn writable(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_dir() || path.file_name().is_none() {
        return Err("this is a directory: name a file in it".to_owned());
    }
    reports::replaceable(&path).map_err(|error| error.to_string())?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if directory.is_dir() {
        Ok(path)
    } else {
        Err(format!(
            "there is no directory {}: make it first",
            directory.display()
        ))
    }
}

/// Leaves a report where it belongs. The migration is over, so that nothing here is
/// more than a warning.
pub fn leave(report: &Report, keep: &Keep, show: &mut Show) {
    let kept = State::open().and_then(|state| reports::keep(&state, report));
    if let Err(error) = kept {
        show.warn(&error.chain());
    }
    if let Some(file) = &keep.report
        && let Err(error) = reports::write(file, report)
    {
        show.warn(&error.chain());
    }
    if let Some(file) = &keep.trace
        && let Err(error) = trace::write(file, report)
    {
        show.warn(&error.chain());
    }
}

pub fn run(args: &Args, output: &Output) -> Exit {
    let mut show = Show::new(output);
    let report = match find(&args.which).and_then(|path| reports::read(&path)) {
        Ok(report) => report,
        Err(error) => {
            show.error(&error);
            complain(
                "help: name a file that `migrate --report` has written, or a migration that began \
                 on this host; without either it is the last one",
            );
            return Exit::Usage;
        }
    };
    let written = |result: Result<(), Error>| match result {
        Ok(()) => true,
        Err(error) => {
            show.error(&error);
            false
        }
    };
    let mut done = true;
    if let Some(file) = &args.html {
        done &= written(reports::write_text(file, &page::page(&report)));
    }
    if let Some(file) = &args.trace {
        done &= written(trace::write(file, &report));
    }
    if args.html.is_none() && args.trace.is_none() {
        show.kept(&report);
    }
    if done { Exit::Done } else { Exit::Internal }
}

/// The file that is meant.
fn find(which: &str) -> Result<PathBuf, Error> {
    let path = Path::new(which);
    if which.contains('/') || path.is_file() {
        return Ok(path.to_owned());
    }
    let state = State::open()?;
    reports::kept(&state, (which != "last").then_some(which))
}
