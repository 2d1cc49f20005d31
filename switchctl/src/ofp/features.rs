//! What the tables of the embedded switch can do, as OpenFlow tells it (1.4, section 7.3.5.5).

use super::multipart::TableFeatures;
use super::oxm;
use super::wire::Writer;

/// Bytes of the features of a table without properties.
pub(super) const EMPTY_LEN: usize = 64;

const INSTRUCTIONS: u16 = 0;
const NEXT_TABLES: u16 = 2;
const WRITE_ACTIONS: u16 = 4;
const APPLY_ACTIONS: u16 = 6;
const MATCH: u16 = 8;
const WILDCARDS: u16 = 10;
const WRITE_SET_FIELD: u16 = 12;
const APPLY_SET_FIELD: u16 = 14;

pub(super) fn put(w: &mut Writer, table: &TableFeatures) {
    let start = w.len();
    w.u16(0);
    w.u8(table.table);
    w.zeros(5);
    // No name: controllers and people know tables by their numbers.
    w.zeros(32);
    // No metadata, and no setting that could be changed.
    w.zeros(8 + 8 + 4);
    w.u32(table.rules_max);
    let ids = |numbers: &'static [u16]| {
        move |w: &mut Writer| {
            for number in numbers {
                w.u16(*number);
                w.u16(4);
            }
        }
    };
    put_property(w, INSTRUCTIONS, ids(&[oxm::GOTO_TABLE, oxm::APPLY_ACTIONS]));
    put_property(w, NEXT_TABLES, |w| (table.table + 1..table.tables).for_each(|next| w.u8(next)));
    put_property(w, WRITE_ACTIONS, |_| ());
    put_property(w, APPLY_ACTIONS, ids(&[oxm::OUTPUT, oxm::PUSH_VLAN, oxm::POP_VLAN, oxm::SET_FIELD]));
    put_property(w, MATCH, |w| oxm::put_match_ids(w, true));
    // Every field can be left out.
    put_property(w, WILDCARDS, |w| oxm::put_match_ids(w, false));
    put_property(w, WRITE_SET_FIELD, |_| ());
    put_property(w, APPLY_SET_FIELD, oxm::put_set_ids);
    let len = w.len() - start;
    w.set_u16(start, len);
}

/// The length is without the padding.
fn put_property(w: &mut Writer, kind: u16, body: impl FnOnce(&mut Writer)) {
    let start = w.len();
    w.u16(kind);
    w.u16(0);
    body(w);
    let len = w.len() - start;
    w.set_u16(start + 2, len);
    w.pad8(start);
}
