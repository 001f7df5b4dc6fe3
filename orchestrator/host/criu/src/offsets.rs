//! Private mappings of one file at different places of it.
//!
//! CRIU 4.2 lets a child inherit a private mapping from its parent when both
//! have one of the same file at the same addresses, and does not compare which
//! part of the file they show (`check_cow_vmas` of `criu/mem.c`). A program that
//! maps a file window by window, in parent and child, would go on with the
//! parent's window in the child. Two mappings of different files are not
//! inherited, so the child's file gets a second number in the images.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;

use prost::Message;
use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};

use crate::error::CriuError;
use crate::images::{ImageDir, private};
use crate::stdio::{Edit, edit, malformed, read, records};

/// `VMA_FILE_PRIVATE` of CRIU's `include/image.h`.
const FILE_PRIVATE: u32 = 1 << 6;
/// Fields of CRIU's `mm_entry`, `vma_entry`, `file_entry` and `reg_file_entry`.
const MM_VMAS: u32 = 14;
const VMA_FILE: u32 = 4;
const FILE_ID: u32 = 2;
const FILE_REGULAR: u32 = 3;
const REGULAR_ID: u32 = 1;

#[derive(Clone, PartialEq, Message)]
struct Task {
    #[prost(uint32, required, tag = "1")]
    pid: u32,
    #[prost(uint32, required, tag = "2")]
    parent: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Mappings {
    #[prost(message, repeated, tag = "14")]
    vmas: Vec<Mapping>,
}

#[derive(Clone, PartialEq, Message)]
struct Mapping {
    #[prost(uint64, required, tag = "1")]
    start: u64,
    #[prost(uint64, required, tag = "2")]
    end: u64,
    #[prost(uint64, required, tag = "3")]
    offset: u64,
    #[prost(uint64, required, tag = "4")]
    file: u64,
    #[prost(uint32, required, tag = "7")]
    status: u32,
}

#[derive(Clone, PartialEq, Message)]
struct FileNumber {
    #[prost(uint32, required, tag = "2")]
    id: u32,
}

/// Where a mapping lies, and which file it shows.
type Place = (u64, u64, u64);

impl ImageDir {
    /// Keeps children from inheriting mappings that show another part of the
    /// same file. To be called when all images have come. Returns how many
    /// mappings that concerned.
    ///
    /// # Errors
    ///
    /// An image is not what CRIU writes, or cannot be rewritten.
    pub fn part_offsets(&mut self) -> Result<usize, CriuError> {
        let directory = self.path().to_owned();
        let path = directory.join("pstree.img");
        let mut tasks = Vec::new();
        for record in records(&path, &read(&path)?)? {
            tasks.push(Task::decode(record).map_err(|error| malformed(&path, &error))?);
        }
        // One process has nothing to inherit.
        if tasks.len() < 2 {
            return Ok(0);
        }
        let mut mappings = BTreeMap::new();
        for task in &tasks {
            mappings.insert(task.pid, private_mappings(&directory, task.pid)?);
        }
        let mut parted = 0;
        let mut next = None;
        for task in &tasks {
            let (Some(own), Some(parents)) = (mappings.get(&task.pid), mappings.get(&task.parent))
            else {
                continue;
            };
            for (place, offset) in own {
                if parents.get(place).is_none_or(|theirs| theirs == offset) {
                    continue;
                }
                let file = u32::try_from(place.2).map_err(|error| malformed(&path, &error))?;
                let number = second_number(&directory, file, &mut next)?;
                renumber(&directory, task.pid, place, number)?;
                parted += 1;
            }
        }
        Ok(parted)
    }
}

/// Private file mappings of a task; none of one that has ended.
fn private_mappings(directory: &Path, pid: u32) -> Result<BTreeMap<Place, u64>, CriuError> {
    let path = directory.join(format!("mm-{pid}.img"));
    if !path.exists() {
        return Ok(BTreeMap::new());
    }
    let mut found = BTreeMap::new();
    for record in records(&path, &read(&path)?)? {
        let mm = Mappings::decode(record).map_err(|error| malformed(&path, &error))?;
        let private = mm.vmas.iter().filter(|vma| vma.status & FILE_PRIVATE != 0);
        found.extend(private.map(|vma| ((vma.start, vma.end, vma.file), vma.offset)));
    }
    Ok(found)
}

/// Adds a file once more under a number of its own.
fn second_number(directory: &Path, file: u32, next: &mut Option<u32>) -> Result<u32, CriuError> {
    let path = directory.join("files.img");
    let image = read(&path)?;
    let mut original = None;
    let mut highest = 0;
    for record in records(&path, &image)? {
        let entry = FileNumber::decode(record).map_err(|error| malformed(&path, &error))?;
        highest = highest.max(entry.id);
        if entry.id == file {
            original = Some(record);
        }
    }
    let lacks = || malformed(&path, &format!("no file {file}"));
    let original = original.ok_or_else(lacks)?;
    let number = next.unwrap_or(highest).checked_add(1).ok_or_else(lacks)?;
    *next = Some(number);
    let mut copy = Vec::with_capacity(original.len() + 16);
    for field in fields(original).ok_or_else(lacks)? {
        match (field.number, field.content) {
            (FILE_ID, _) => {}
            (FILE_REGULAR, Some(regular)) => {
                let mut regular = regular.to_vec();
                put_number(&mut regular, REGULAR_ID, number.into());
                put_message(&mut copy, FILE_REGULAR, &regular);
            }
            _ => copy.extend(field.whole),
        }
    }
    put_number(&mut copy, FILE_ID, number.into());
    let size = u32::try_from(copy.len()).map_err(|error| malformed(&path, &error))?;
    let added = [&size.to_le_bytes()[..], &copy].concat();
    private()
        .append(true)
        .open(&path)
        .and_then(|mut files| files.write_all(&added))
        .map_err(|source| CriuError::image("extend", &path, source))?;
    Ok(number)
}

/// Makes a mapping one of another file.
fn renumber(directory: &Path, pid: u32, place: &Place, number: u32) -> Result<(), CriuError> {
    edit(&directory.join(format!("mm-{pid}.img")), |record| {
        let mut out = Vec::with_capacity(record.len() + 16);
        // It was decoded before.
        for field in fields(record).unwrap_or_default() {
            let vma = match (field.number, field.content) {
                (MM_VMAS, Some(vma)) => vma,
                _ => {
                    out.extend(field.whole);
                    continue;
                }
            };
            let mapping = Mapping::decode(vma)?;
            if (mapping.start, mapping.end, mapping.file) == *place {
                let mut vma = vma.to_vec();
                put_number(&mut vma, VMA_FILE, number.into());
                put_message(&mut out, MM_VMAS, &vma);
            } else {
                out.extend(field.whole);
            }
        }
        Ok(Edit::Replace(out))
    })
}

/// A field of a message, with fields that are not declared here kept as they are.
struct Field<'a> {
    number: u32,
    whole: &'a [u8],
    /// Of a field with a length.
    content: Option<&'a [u8]>,
}

/// The fields of a message; `None` when it is malformed.
fn fields(message: &[u8]) -> Option<Vec<Field<'_>>> {
    let mut found = Vec::new();
    let mut rest = message;
    while !rest.is_empty() {
        let start = rest;
        let (number, wire) = decode_key(&mut rest).ok()?;
        let skip = match wire {
            WireType::Varint => decode_varint(&mut rest).map(|_| 0).ok()?,
            WireType::SixtyFourBit => 8,
            WireType::ThirtyTwoBit => 4,
            WireType::LengthDelimited => usize::try_from(decode_varint(&mut rest).ok()?).ok()?,
            WireType::StartGroup | WireType::EndGroup => return None,
        };
        let (content, after) = rest.split_at_checked(skip)?;
        rest = after;
        found.push(Field {
            number,
            whole: &start[..start.len() - rest.len()],
            content: (wire == WireType::LengthDelimited).then_some(content),
        });
    }
    Some(found)
}

/// Of several values of one field the last one counts.
fn put_number(out: &mut Vec<u8>, field: u32, value: u64) {
    encode_key(field, WireType::Varint, out);
    encode_varint(value, out);
}

fn put_message(out: &mut Vec<u8>, field: u32, message: &[u8]) {
    encode_key(field, WireType::LengthDelimited, out);
    encode_varint(message.len() as u64, out);
    out.extend(message);
}

#[cfg(test)]
mod tests {
    use super::*;
    use migrate_core::wire::ImagePiece;

    /// As CRIU has it, with fields that are not declared above.
    #[derive(Clone, PartialEq, Message)]
    struct WholeFile {
        #[prost(int32, required, tag = "1")]
        kind: i32,
        #[prost(uint32, required, tag = "2")]
        id: u32,
        #[prost(message, optional, tag = "3")]
        regular: Option<WholeRegular>,
    }

    #[derive(Clone, PartialEq, Message)]
    struct WholeRegular {
        #[prost(uint32, required, tag = "1")]
        id: u32,
        #[prost(string, required, tag = "6")]
        name: String,
        #[prost(uint64, optional, tag = "8")]
        size: Option<u64>,
    }

    fn add(images: &mut ImageDir, name: &str, records: &[Vec<u8>]) {
        let mut data = vec![0; 8];
        for record in records {
            data.extend(u32::try_from(record.len()).unwrap().to_le_bytes());
            data.extend(record);
        }
        let piece = ImagePiece {
            name,
            last: true,
            data: &data,
        };
        images.image_piece(&piece).unwrap();
    }

    fn task(pid: u32, parent: u32) -> Vec<u8> {
        Task { pid, parent }.encode_to_vec()
    }

    fn file(id: u32) -> WholeFile {
        let name = format!("/file-{id}");
        let size = Some(7);
        WholeFile {
            kind: 1,
            id,
            regular: Some(WholeRegular { id, name, size }),
        }
    }

    fn mapping(start: u64, offset: u64, file: u64, status: u32) -> Mapping {
        let end = start + 0x4000;
        Mapping {
            start,
            end,
            offset,
            file,
            status,
        }
    }

    fn mm(vmas: &[Mapping]) -> Vec<u8> {
        let vmas = vmas.to_vec();
        let mut record = Mappings { vmas }.encode_to_vec();
        put_number(&mut record, 1, 99);
        record
    }

    fn found(images: &ImageDir, name: &str) -> Vec<Vec<u8>> {
        let path = images.path().join(name);
        let image = read(&path).unwrap();
        let records = records(&path, &image).unwrap();
        records.into_iter().map(<[u8]>::to_vec).collect()
    }

    #[test]
    fn only_another_part_of_the_same_file_gets_a_number_of_its_own() {
        let parent = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut images = ImageDir::create(parent.path().join("images")).unwrap();
        add(
            &mut images,
            "pstree.img",
            &[task(5, 0), task(6, 5), task(7, 6)],
        );
        let files = [file(2).encode_to_vec(), file(9).encode_to_vec()];
        add(&mut images, "files.img", &files);
        let root = [
            mapping(0x10000, 0, 2, FILE_PRIVATE),
            mapping(0x20000, 0, 2, FILE_PRIVATE),
            mapping(0x30000, 0, 2, 1),
            mapping(0x40000, 0, 2, FILE_PRIVATE),
        ];
        let child = [
            mapping(0x10000, 0x1000, 2, FILE_PRIVATE),
            mapping(0x20000, 0, 2, FILE_PRIVATE),
            mapping(0x30000, 0x1000, 2, 1),
            mapping(0x40000, 0x1000, 9, FILE_PRIVATE),
        ];
        add(&mut images, "mm-5.img", &[mm(&root)]);
        add(&mut images, "mm-6.img", &[mm(&child)]);
        // As its parent; and nothing is known of one that has ended.
        add(&mut images, "mm-7.img", &[mm(&child)]);

        assert_eq!(images.part_offsets().unwrap(), 1);
        let files = found(&images, "files.img");
        let copy = WholeFile::decode(&files[2][..]).unwrap();
        let mut expected = file(2);
        expected.id = 10;
        expected.regular.as_mut().unwrap().id = 10;
        assert_eq!((files.len(), copy), (3, expected));
        let record = &found(&images, "mm-6.img")[0];
        let vmas = Mappings::decode(&record[..]).unwrap().vmas;
        let numbers: Vec<u64> = vmas.iter().map(|vma| vma.file).collect();
        assert_eq!(numbers, [10, 2, 2, 9]);
        let rest: Vec<u32> = fields(record).unwrap().iter().map(|f| f.number).collect();
        assert_eq!(rest, [14, 14, 14, 14, 1]);
        assert_eq!(found(&images, "mm-5.img"), [mm(&root)]);
        assert_eq!(found(&images, "mm-7.img"), [mm(&child)]);
    }

    #[test]
    fn fields_end_where_the_message_does() {
        let whole = file(3).encode_to_vec();
        assert_eq!(fields(&whole).unwrap().len(), 3);
        assert!((1..whole.len()).any(|cut| fields(&whole[..cut]).is_none()));
        // A length beyond the end.
        assert!(fields(&[0x1a, 0xff, 0xff, 0xff, 0xff, 0x0f]).is_none());
    }
}
