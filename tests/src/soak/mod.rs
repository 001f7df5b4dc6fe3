//! One workload that moves back and forth for as long as one likes, between
//! standing agents, while its clients judge every reply. What the hosts have
//! of ours is counted after each hop and must not grow.
//!
//! ```text
//!   figures   what is counted
//!   judge     whether it grows
//! ```

pub mod figures;
pub mod judge;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use migrate_test_hosts::{HostName, LabGuard};

use crate::client::StrictClient;
use crate::hosts::{TcpCounts, eventually};
use crate::migration::{arrives, moves_by, serves_old_connections};
use crate::refusals::{clean, scoped};
use crate::standing;
use crate::workload::{Kind, Workload};
use figures::{Figure, Figures, count};
use judge::{Course, Rule};

/// The first hops, in which caches fill: CRIU's findings about the kernel, what
/// allocators keep. They are not judged.
pub const WARM_UP_HOPS: usize = 4;
/// A tree is restored at each host with all its memory and with none: hops
/// after which everything has been tried.
const ROUND_HOPS: usize = 4;
/// A first and a last part to compare, each with all there is to try.
pub const HOPS_MIN: usize = WARM_UP_HOPS + 2 * ROUND_HOPS;
/// Keys that the client writes first and reads back at the end.
const KEYS: &str = "1000";
/// What a migration leaves on its way out is gone a moment later.
const SETTLE_WITHIN: Duration = Duration::from_secs(10);
/// All memory of a small tree has arrived in a moment.
const ARRIVES_WITHIN: Duration = Duration::from_secs(60);

/// How long, and under what load.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Moves, at least [`HOPS_MIN`].
    pub hops: usize,
    /// Connections of the strict client.
    pub connections: usize,
}

/// How it went.
#[derive(Debug)]
pub struct Outcome {
    /// Hops that were made.
    pub hops: usize,
    /// What went wrong, in words; empty when nothing did.
    pub faults: Vec<String>,
    /// The figures and what became of them, for people.
    pub table: String,
}

/// Figures by where the tree was and which host they are of.
type Series = BTreeMap<(HostName, bool, Figure), Vec<(usize, u64)>>;

/// A host, and whether the tree is there.
type Place = (HostName, bool);

/// Moves a redis back and forth. `tell` gets a line for each hop; when `stop`
/// says so, there is no further one.
///
/// # Panics
///
/// When the hosts, the agents or the workload do not come up.
pub fn run(options: Options, mut tell: impl FnMut(&str), stop: impl Fn() -> bool) -> Outcome {
    let mut soak = Soak::start(options.connections);
    let (mut series, mut faults, mut made) = (Series::new(), Vec::new(), 0);
    let begun = Instant::now();
    while made < options.hops && !stop() {
        let number = made + 1;
        // A judge that panics has said why on standard error.
        let hop = catch_unwind(AssertUnwindSafe(|| soak.hop(number, &series, options.hops)));
        match hop {
            Ok((line, figures)) => {
                tell(&format!("hop {number} of {}: {line}", options.hops));
                for (place, figures) in figures {
                    for (figure, value) in figures {
                        let key = (place.0, place.1, figure);
                        series.entry(key).or_default().push((number, value));
                    }
                }
            }
            Err(_) if stop() => break,
            Err(panic) => {
                faults.push(format!("hop {number}: {}", words_of(&*panic)));
                break;
            }
        }
        made = number;
    }
    let per_hop = begun.elapsed().as_secs_f64() / made.max(1) as f64;
    faults.extend(soak.end());
    let (mut table, grown) = judged(&series, made);
    let _ = writeln!(table, "{made} hops, {per_hop:.2} s each");
    faults.extend(grown);
    Outcome {
        hops: made,
        faults,
        table,
    }
}

fn words_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without words").to_owned()
}

/// The first and the last of the hops that are judged, both with everything
/// there is to try.
fn parts(
    hops: usize,
) -> Option<(
    std::ops::RangeInclusive<usize>,
    std::ops::RangeInclusive<usize>,
)> {
    let judged = hops.checked_sub(WARM_UP_HOPS)?;
    let part = (judged / 3).next_multiple_of(ROUND_HOPS);
    (2 * part <= judged && part > 0).then(|| {
        (
            WARM_UP_HOPS + 1..=WARM_UP_HOPS + part,
            hops - part + 1..=hops,
        )
    })
}

/// The table, and a sentence for each figure that grows.
fn judged(series: &Series, hops: usize) -> (String, Vec<String>) {
    let mut table = format!(
        "{:<22} {:<16} {:>8} {:>8} {:>8}  verdict\n",
        "figure", "where", "first", "last", "most"
    );
    let Some((first, last)) = parts(hops) else {
        let _ = writeln!(
            table,
            "nothing is judged by {hops} hops; {HOPS_MIN} is the least"
        );
        return (table, Vec::new());
    };
    let mut grown = Vec::new();
    let mut lines = BTreeMap::new();
    for ((host, has_tree, figure), values) in series {
        let within = |part: &std::ops::RangeInclusive<usize>| -> Vec<u64> {
            let inside = values.iter().filter(|(hop, _)| part.contains(hop));
            inside.map(|(_, value)| *value).collect()
        };
        let all = within(&(first.start().to_owned()..=hops));
        let Some(course) = figure.rule().judge(&within(&first), &within(&last), &all) else {
            continue;
        };
        let place = match (figure, has_tree) {
            (Figure::TreeDescriptors | Figure::TreeMappings | Figure::TreeMemoryKib, _) => {
                format!("at {host}")
            }
            (_, true) => format!("{host}, tree here"),
            (_, false) => host.to_string(),
        };
        let Course {
            at_first,
            at_last,
            most,
            grows,
        } = course;
        let verdict = match (grows, figure.rule()) {
            (true, _) => "GROWS",
            (false, Rule::AtMost(_)) => "within its bound",
            (false, _) => "steady",
        };
        if grows {
            let name = figure.name();
            grown.push(format!(
                "{name} ({place}) grew from {at_first} to {at_last}, {most} at most"
            ));
        }
        let line = format!(
            "{:<22} {place:<16} {at_first:>8} {at_last:>8} {most:>8}  {verdict}\n",
            figure.name()
        );
        lines.insert((*figure, *host, *has_tree), line);
    }
    table.extend(lines.into_values());
    (table, grown)
}

/// What there is while it lasts. The client ends before its lab.
struct Soak {
    client: Option<StrictClient>,
    workload: Workload,
    agents: BTreeMap<HostName, i32>,
    resets: u64,
    at: HostName,
    lab: LabGuard,
}

impl Soak {
    fn start(connections: usize) -> Self {
        let lab = scoped("soak");
        let agents = stand(&lab);
        let workload = match Workload::start(Kind::Redis, &lab) {
            Ok(workload) => workload,
            Err(error) => panic!("{error}"),
        };
        let options = ["--keys", KEYS, "--populate", "--verify"];
        let client = match workload.client(&lab, connections, &options) {
            Ok(client) => client,
            Err(error) => panic!("{error}"),
        };
        Self {
            resets: resets(&lab),
            client: Some(client),
            workload,
            agents,
            at: HostName::Host1,
            lab,
        }
    }

    /// Moves the workload to the other host, and counts.
    fn hop(
        &mut self,
        number: usize,
        series: &Series,
        hops: usize,
    ) -> (String, Vec<(Place, Figures)>) {
        let (from, to) = (self.at, other(self.at));
        // Each way with both.
        let restore = ["eager", "lazy"][(number - 1) / 2 % 2];
        let words = standing::words(from, to);
        let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
        words.extend(["--restore", restore]);
        let (report, _) = moves_by(&self.lab, &self.workload, (from, to), &words);
        self.at = to;
        let Some(client) = &mut self.client else {
            panic!("the client has been stopped");
        };
        let moved = usize::try_from(report.connections).unwrap_or(usize::MAX);
        serves_old_connections(client);
        let snapshot = match client.snapshot() {
            Ok(snapshot) => snapshot,
            Err(error) => panic!("{error}"),
        };
        assert_eq!(moved, snapshot.live, "{report:?} {snapshot:?}");
        let harm = (snapshot.errors, snapshot.lost, snapshot.doubled);
        assert_eq!(harm, (0, 0, 0), "{snapshot:?}");
        assert_eq!(resets(&self.lab), self.resets, "connections were reset");
        let destination = self.lab.host(to);
        let arrived = eventually(ARRIVES_WITHIN, || !arrives(&destination));
        assert!(arrived, "memory has not arrived within {ARRIVES_WITHIN:?}");
        for name in [from, to] {
            clean(&self.lab.host(name));
        }
        let mut figures = Vec::new();
        for name in [HostName::Host1, HostName::Host2] {
            let place = (name, name == to);
            figures.push((place, self.settled(place, series, hops)));
        }
        let line = format!(
            "to {to}, {restore}, blackout {:.1} ms, worst gap {:.1} ms, {} requests",
            report.blackout.total_us() as f64 / 1e3,
            snapshot.worst_gap_us as f64 / 1e3,
            snapshot.requests,
        );
        (line, figures)
    }

    /// The figures of a host when nothing is on its way out any more: when what
    /// must stay constant is what it was in the first part, or never.
    fn settled(&self, (name, has_tree): Place, series: &Series, hops: usize) -> Figures {
        let (host, agent) = (self.lab.host(name), self.agents[&name]);
        let tree = has_tree.then_some(self.workload.pid);
        let first = parts(hops).map(|(first, _)| first);
        let was = |figure| {
            let values = series.get(&(name, has_tree, figure))?.iter();
            let in_first =
                values.filter(|(hop, _)| first.as_ref().is_some_and(|f| f.contains(hop)));
            in_first.map(|(_, value)| *value).min()
        };
        let mut counted = Ok(Figures::new());
        eventually(SETTLE_WITHIN, || {
            counted = count(&host, agent, tree);
            counted.as_ref().is_ok_and(|figures| {
                figures.iter().all(|(figure, value)| {
                    figure.rule() != Rule::Constant || was(*figure).is_none_or(|was| *value <= was)
                })
            })
        });
        match counted {
            Ok(figures) => figures,
            Err(error) => panic!("could not count on {name}: {error}"),
        }
    }

    /// The client's last word.
    fn end(&mut self) -> Option<String> {
        match self.client.take()?.stop() {
            Ok(verdict) if verdict.is_clean() => None,
            Ok(verdict) => Some(format!("{verdict}: {:?}", verdict.first_errors)),
            Err(error) => Some(error.to_string()),
        }
    }
}

fn other(host: HostName) -> HostName {
    match host {
        HostName::Host1 => HostName::Host2,
        HostName::Host2 | HostName::Client => HostName::Host1,
    }
}

/// Connections of the client that a RST has ended.
fn resets(lab: &LabGuard) -> u64 {
    match TcpCounts::of(&lab.host(HostName::Client)) {
        Ok(counts) => counts.resets,
        Err(error) => panic!("{error}"),
    }
}

/// Starts an agent on each host that waits for the other one; their PIDs.
fn stand(lab: &LabGuard) -> BTreeMap<HostName, i32> {
    let names = [HostName::Host1, HostName::Host2];
    standing::certify(lab, &names);
    names
        .map(|name| (name, standing::start(&lab.host(name))))
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_parts_hold_everything_there_is_to_try() {
        assert_eq!(parts(HOPS_MIN), Some((5..=8, 9..=12)));
        assert_eq!(parts(200), Some((5..=72, 133..=200)));
        assert_eq!(parts(HOPS_MIN - 1), None);
    }

    #[test]
    fn what_grows_is_named() {
        let mut series = Series::new();
        let key = |figure| (HostName::Host2, false, figure);
        for hop in 1..=12 {
            let grown = u64::from(hop > 8);
            let values = [(Figure::Mounts, 20 + grown), (Figure::Cgroups, 7)];
            for (figure, value) in values {
                series.entry(key(figure)).or_default().push((hop, value));
            }
        }
        let (table, grown) = judged(&series, 12);
        assert_eq!(grown, ["mounts (host2) grew from 20 to 21, 21 at most"]);
        assert!(
            table.contains("GROWS") && table.contains("steady"),
            "{table}"
        );
    }
}
