//! Preflight: does the tree fit here? Nothing is changed.

use std::path::Path;

use migrate_core::facts::{FileFacts, FileRole, HostFacts, StdioFacts, StdioKind, TreeFacts};
use migrate_core::preflight::{Finding, refused};
use migrate_core::unit::AdoptChoice;
use migrate_core::wire::{Message, StdioChoice};
use migrate_net::Net;
use migrate_proc::Adoption;

use super::{Destination, Order};
use crate::error::Error;

impl Destination {
    /// Compares the tree with this host and answers with every finding.
    pub(super) async fn preflight(
        &mut self,
        mut tree: TreeFacts,
        source: &HostFacts,
        stdio: StdioChoice,
        adopt: AdoptChoice,
    ) -> Result<(), Error> {
        crate::sweep::sweep(&self.state).await;
        // What was accepted before is not what is asked for now.
        self.order = None;
        let mut findings = self.policy.judge(&tree);
        let (found, criu) = crate::examine_criu("destination").await;
        findings.extend(found);
        let mut host = crate::images::host_facts(&self.state)?;
        host.criu = criu.as_ref().map(|criu| criu.version);
        findings.extend(migrate_proc::compare_hosts(source, &host, &tree));
        findings.extend(migrate_proc::compare_pids(&tree));
        findings.extend(super::claims::compare(
            &self.state,
            &self.migration_id,
            &tree,
        )?);
        findings.extend(redirect_files(&mut tree, &stdio));
        findings.extend(migrate_proc::compare_files(&tree.files));
        findings.extend(judge_stdio(&tree.stdio, &stdio));
        findings.extend(tree.tunnel.as_ref().map(migrate_proc::compare_tunnel));
        let admits = |unit: &str| self.policy.admits_unit(unit);
        let adoption = match Adoption::plan(&tree, adopt, admits) {
            Ok(adoption) => adoption,
            Err(error) => {
                // The tree needs no unit to run.
                findings.push(Finding::note(
                    "unit of the tree",
                    format!("it gets none there: {}", crate::error::chain(&error)),
                    "see whether `systemctl status` answers there",
                ));
                Adoption::Stays
            }
        };
        findings.extend(adoption.finding());
        let net = Net::open().await?;
        let (network, placements) = match self.parked {
            None => migrate_net::compare(&net, &tree).await?,
            Some(_) => migrate_net::compare_in_place(&net, &tree).await?,
        };
        findings.extend(network);

        if !refused(&findings) {
            self.order = Some(Order {
                tree,
                stdio,
                placements,
                adoption,
            });
            self.net = Some(net);
            self.criu = criu;
        }
        let answer = Message::Findings {
            findings,
            destination: Box::new(host),
        };
        self.send(&answer).await
    }
}

/// Decides which files on standard streams move as they are: those that this
/// host has. The others are taken from the list of files, and lead from now on
/// to where the user said.
fn redirect_files(tree: &mut TreeFacts, choice: &StdioChoice) -> Vec<Finding> {
    let mut findings = Vec::new();
    let files = &mut tree.files;
    tree.stdio.retain(|stream| {
        if stream.kind != StdioKind::File {
            return true;
        }
        let of_stream = |file: &FileFacts| {
            file.path == stream.resource && matches!(file.role, FileRole::Open | FileRole::Appended)
        };
        let Some(at) = files.iter().position(of_stream) else {
            return false;
        };
        let mut unlike = migrate_proc::compare_files(&files[at..=at]);
        if !refused(&unlike) {
            return false;
        }
        let subject = format!("standard stream {}", stream.resource);
        let leads_to = match choice {
            StdioChoice::Keep => {
                for finding in &mut unlike {
                    finding.way_out +=
                        "; or say where the stream leads on the destination: --stdio FILE";
                }
                findings.append(&mut unlike);
                files.remove(at);
                return false;
            }
            StdioChoice::Null => "/dev/null",
            StdioChoice::Journal => "the destination's journal",
            StdioChoice::File(path) => path,
        };
        findings.push(Finding::ok(
            subject,
            format!("a file that is not here alike becomes {leads_to}"),
        ));
        files.remove(at);
        true
    });
    findings
}

/// Where the tree's streams are to lead must be there.
fn judge_stdio(stdio: &[StdioFacts], choice: &StdioChoice) -> Option<Finding> {
    if stdio.is_empty() {
        return None;
    }
    match choice {
        StdioChoice::Journal if !Path::new(super::prepare::JOURNAL_SOCKET).exists() => {
            Some(Finding::refused(
                "--stdio journal",
                "no journal takes messages on the destination",
                "use --stdio null or --stdio FILE",
            ))
        }
        StdioChoice::File(path) => {
            let path = Path::new(path);
            let parent = path.parent().unwrap_or(Path::new("/"));
            if !path.is_absolute() {
                Some(Finding::refused(
                    format!("--stdio {}", path.display()),
                    "is not an absolute path",
                    "name the file on the destination from the root directory on",
                ))
            } else if !parent.is_dir() {
                Some(Finding::refused(
                    format!("--stdio {}", path.display()),
                    format!("{} is no directory on the destination", parent.display()),
                    "create it there, or name another file",
                ))
            } else if path.is_dir() {
                Some(Finding::refused(
                    format!("--stdio {}", path.display()),
                    "is a directory on the destination",
                    "name a file in it",
                ))
            } else {
                None
            }
        }
        StdioChoice::Keep | StdioChoice::Null | StdioChoice::Journal => None,
    }
}
