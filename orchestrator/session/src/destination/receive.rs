//! Receive and restore: pages and images come in, the copy is built and held
//! before its first instruction.

use std::time::{Duration, Instant};

use migrate_channel::Frame;
use migrate_core::wire::{ImagePiece, Message};
use migrate_criu::{Notice, RestoreOptions};

use super::{Destination, Engine, Incoming, SILENCE};
use crate::error::Error;
use crate::inbox::Inbox;

/// What the source has counted must have come.
struct Announced {
    pages: u64,
    images: u32,
}

impl Destination {
    /// Takes frames until `Dumped`.
    pub(super) async fn receive(&mut self, blackout_limit: Duration) -> Result<(), Error> {
        let announced = self.take_frames(SILENCE.max(blackout_limit)).await?;
        self.dumped_at = Some(Instant::now());
        let Some(images) = &mut self.images else {
            return Err(nothing("the image directory"));
        };
        let stats = images.finish()?;
        if (stats.pages, stats.images) != (announced.pages, announced.images) {
            return Err(Error::Changed(format!(
                "{} pages and {} images came, {} and {} were sent",
                stats.pages, stats.images, announced.pages, announced.images
            )));
        }
        Ok(())
    }

    async fn take_frames(&mut self, limit: Duration) -> Result<Announced, Error> {
        const AWAITED: &str = "pages and images";
        loop {
            let Incoming::Frames(receiver) = &mut self.incoming else {
                return Err(nothing("the stream of frames"));
            };
            let Some(images) = &mut self.images else {
                return Err(nothing("the image directory"));
            };
            let frame = match receiver.next(limit).await {
                Ok(frame) => frame,
                Err(error) if error.is_disconnect() => {
                    return Err(Error::PeerGone {
                        peer: self.peer.clone(),
                        awaited: AWAITED,
                    });
                }
                Err(source) => {
                    return Err(Error::Channel {
                        peer: self.peer.clone(),
                        source,
                    });
                }
            };
            match frame {
                Frame::Pages { run, data } => images.pages(run, &data)?,
                Frame::Image { name, last, data } => images.image_piece(&ImagePiece {
                    name: &name,
                    last,
                    data: &data,
                })?,
                Frame::Packet(_) => {
                    return Err(Error::Unexpected {
                        peer: self.peer.clone(),
                        got: "a packet".to_owned(),
                        awaited: AWAITED,
                    });
                }
                Frame::Control(Message::Flows(flows)) => {
                    if let Some(gate) = &self.gate {
                        gate.add_flows(&flows)?;
                    }
                }
                Frame::Control(Message::Dumped { pages, images }) => {
                    return Ok(Announced { pages, images });
                }
                Frame::Control(Message::Abort { reason }) => return Err(Error::Aborted(reason)),
                Frame::Control(other) => return Err(self.unexpected(&other, AWAITED)),
            }
        }
    }

    /// Lets CRIU build the copy and holds it.
    pub(super) async fn restore(&mut self) -> Result<(), Error> {
        let Incoming::Frames(receiver) = std::mem::replace(&mut self.incoming, Incoming::Closed)
        else {
            return Err(nothing("the stream of frames"));
        };
        let mut inbox = Inbox::new(self.peer.clone(), receiver);
        let order = self.order.as_ref().ok_or_else(|| nothing("the tree"))?;
        let images = self
            .images
            .as_mut()
            .ok_or_else(|| nothing("the image directory"))?;
        let Engine::Ready(worker) = std::mem::replace(&mut self.engine, Engine::None) else {
            return Err(nothing("CRIU"));
        };
        // Each stream that led out of the tree becomes what was opened for it.
        let mut inherit_fd = Vec::new();
        for (index, resource) in self.streams.iter().enumerate() {
            if let Some(key) = images.redirect(resource)? {
                inherit_fd.push((key, worker.inherited(index)));
            }
        }
        let options = RestoreOptions {
            shell_job: order.tree.shell_job,
            inherit_fd,
            external_unix: true,
            ..RestoreOptions::new(images.path())
        };
        let session = worker.restore(&options).await?;
        self.engine = Engine::Held(session);
        let held = tokio::select! {
            held = self.held() => held,
            // Nothing is due from the source now but the end.
            message = inbox.next("the restored copy") => {
                match message {
                    Ok(message) => Err(crate::inbox::unexpected(&self.peer, &message, "the restored copy")),
                    Err(error) => Err(error),
                }
            }
        };
        self.incoming = Incoming::Messages(inbox);
        held?;
        let restore_us = self.dumped_at.map_or(0, |at| {
            u64::try_from(at.elapsed().as_micros()).unwrap_or(u64::MAX)
        });
        self.send(&Message::Restored { restore_us }).await
    }

    /// CRIU is given up for stuck after this much silence; the source's
    /// `--max-blackout` is shorter as a rule and ends the connection.
    const RESTORE_LIMIT: Duration = Duration::from_secs(600);

    /// Answers CRIU until it has the copy complete and asks whether to let it go.
    async fn held(&mut self) -> Result<(), Error> {
        let Engine::Held(session) = &mut self.engine else {
            return Err(nothing("CRIU's restore"));
        };
        loop {
            match session.next(Self::RESTORE_LIMIT).await? {
                Notice::PostRestore { .. } => return Ok(()),
                Notice::Finished(_) => {
                    return Err(Error::OutOfOrder {
                        got: "the end".to_owned(),
                        awaited: "the restored copy",
                    });
                }
                _ => session.answer(true).await?,
            }
        }
    }
}

pub(super) fn nothing(what: &'static str) -> Error {
    Error::Changed(format!("{what} is not there"))
}
