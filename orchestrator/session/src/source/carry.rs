//! Carrying held packets to the destination while something else is awaited.

use std::time::Duration;

use migrate_core::wire::Message;
use migrate_ebpf_common::Direction;
use migrate_gate::HeldPacket;

use super::{Migration, not_yet};
use crate::error::Error;

impl Migration {
    /// Copies of carried packets that are kept for a rollback, in bytes; what
    /// is carried beyond would have to be sent again by its sender.
    const CARRIED_BYTES_MAX: usize = crate::held::BYTES_CAP;

    /// The next message of the destination; packets that come to be held
    /// meanwhile go there at once.
    pub(super) async fn next_while_carrying(
        &mut self,
        awaited: &'static str,
        limit: Duration,
    ) -> Result<Message, Error> {
        let silent = tokio::time::sleep(limit);
        tokio::pin!(silent);
        loop {
            let link = self
                .link
                .as_mut()
                .ok_or_else(|| not_yet("the connection"))?;
            let packet = tokio::select! {
                biased;
                message = link.inbox.next(awaited) => return message,
                packet = crate::held::next(&mut self.held) => packet,
                () = &mut silent => {
                    return Err(Error::PeerSilent {
                        peer: link.peer.clone(),
                        awaited,
                        waited: limit,
                    });
                }
            };
            self.carry(vec![packet]).await?;
        }
    }

    /// Carries what is held at this moment, after `first`.
    pub(super) async fn carry(&mut self, next: Vec<HeldPacket>) -> Result<(), Error> {
        let mut first = std::mem::take(&mut self.waiting);
        first.extend(next);
        first.extend(crate::held::drain(&mut self.held));
        // Kept before any is sent, for sending may be given up at any moment.
        for packet in &first {
            if self.carried_bytes + packet.frame.len() <= Self::CARRIED_BYTES_MAX {
                self.carried_bytes += packet.frame.len();
                self.carried.push(packet.clone());
            }
        }
        let link = self
            .link
            .as_mut()
            .ok_or_else(|| not_yet("the connection"))?;
        for packet in first {
            // What this host's kernel had to say for a frozen tree is of no
            // use elsewhere; only a rollback needs it.
            if packet.direction == Direction::Ingress {
                link.sender
                    .packet(&packet.frame)
                    .await
                    .map_err(|source| Error::Channel {
                        peer: link.peer.clone(),
                        source,
                    })?;
            }
        }
        link.sender.flush().await.map_err(|source| Error::Channel {
            peer: link.peer.clone(),
            source,
        })
    }
}
