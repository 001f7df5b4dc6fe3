//! Where the kernel writes into a thread's memory by itself.

use std::fs;
use std::path::Path;

use prost::Message;

use crate::error::CriuError;

/// Two magic numbers stand before the first record.
const MAGIC_BYTES: usize = 8;

#[derive(Clone, PartialEq, Message)]
struct Core {
    #[prost(message, optional, tag = "5")]
    thread: Option<Thread>,
}

#[derive(Clone, PartialEq, Message)]
struct Thread {
    #[prost(message, optional, tag = "15")]
    rseq: Option<Rseq>,
}

/// CRIU's `images/rseq.proto`.
#[derive(Clone, PartialEq, Message)]
struct Rseq {
    #[prost(uint64, required, tag = "1")]
    address: u64,
    #[prost(uint32, required, tag = "2")]
    bytes: u32,
}

/// Address and length of each thread's `struct rseq`. The kernel notes there
/// on which CPU the thread runs, also while a debugger such as CRIU makes it run.
///
/// # Errors
///
/// An image cannot be read.
pub fn rseq_areas(images: &Path) -> Result<Vec<(u64, u32)>, CriuError> {
    let listing = |source| CriuError::image("list", images, source);
    let mut areas = Vec::new();
    for entry in fs::read_dir(images).map_err(listing)? {
        let path = entry.map_err(listing)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !name.starts_with("core-") {
            continue;
        }
        let image = fs::read(&path).map_err(|source| CriuError::image("read", &path, source))?;
        areas.extend(area(&image));
    }
    areas.sort_unstable();
    Ok(areas)
}

fn area(image: &[u8]) -> Option<(u64, u32)> {
    let (length, record) = image.get(MAGIC_BYTES..)?.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
    let core = Core::decode(record.get(..length)?).ok()?;
    let rseq = core.thread?.rseq?;
    (rseq.address != 0 && rseq.bytes != 0).then_some((rseq.address, rseq.bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_found_in_core_images_only() {
        let directory = tempfile::tempdir().unwrap();
        let core = Core {
            thread: Some(Thread {
                rseq: Some(Rseq {
                    address: 0x7000,
                    bytes: 32,
                }),
            }),
        }
        .encode_to_vec();
        let mut image = vec![0; MAGIC_BYTES];
        image.extend_from_slice(&u32::try_from(core.len()).unwrap().to_le_bytes());
        image.extend_from_slice(&core);
        fs::write(directory.path().join("core-7.img"), &image).unwrap();
        fs::write(
            directory.path().join("core-8.img"),
            &image[..image.len() - 1],
        )
        .unwrap();
        fs::write(directory.path().join("mm-7.img"), &image).unwrap();
        assert_eq!(rseq_areas(directory.path()).unwrap(), [(0x7000, 32)]);
    }
}
