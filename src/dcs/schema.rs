//! Key names and wire format of the store. The only file that knows how a record looks outside of this process.
//!
//! Every value is a JSON object with `"v": 1` and the record's fields. What may change without a new version: a field may be
//! added, at the top level of the object. A reader that does not know it keeps it when it writes the key again, so agents of
//! two releases can work on one cluster. Everything else (another meaning, another type, a field taken away) is a new `v`,
//! and a reader that meets a `v` above its own says so and does not guess (S12).
//!
//! Nothing here panics on what stands in the store: people and other programs write there too.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::core::names::{ClusterName, MemberName};
use crate::core::records::{ClusterRecords, Entry, HistoryRecord, Key, Keyed, Request, Transaction, Write};
use crate::core::timeline::{Term, TimelineId};

/// The format that this program writes, and the highest that it reads.
pub const VERSION: u64 = 1;

/// Longest value, written or read. Our largest record (a member with tags and a reason) has about 2 KiB; etcd itself stops
/// at 1.5 MiB for a whole transaction.
pub const MAX_VALUE: usize = 64 * 1024;

/// Most comparisons or writes of one transaction: etcd's own default limit.
pub const MAX_OPERATIONS: usize = 128;

/// Numbers above this are not exact for readers that keep numbers as doubles (jq, JavaScript): written as strings.
const MAX_EXACT: u64 = 1 << 53;

/// Fields that hold a `u64` in our records and may come back as a string.
const WIDE: [&str; 12] = [
    "system_identifier",
    "term",
    "seq",
    "beat",
    "start_counter",
    "ttl_ms",
    "at_unix_ms",
    "timeout_ms",
    "done_bytes",
    "total_bytes",
    "store_id",
    "highest_term",
];

// === Key names ===

/// Where a cluster's keys stand: `<prefix>/<cluster>/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root(String);

impl Root {
    /// `prefix` is taken with or without slashes at its ends.
    pub fn new(prefix: &str, cluster: &ClusterName) -> Root {
        let prefix = prefix.trim_matches('/');
        if prefix.is_empty() { Root(format!("/{cluster}/")) } else { Root(format!("/{prefix}/{cluster}/")) }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The whole key of a name that [`name`] made.
    pub fn key(&self, name: &str) -> String {
        format!("{}{name}", self.0)
    }
}

/// The name of a key below the cluster's root. An error for a request whose id could be taken for another key.
pub fn name(key: &Key) -> Result<String, String> {
    Ok(match key {
        Key::Init => "init".to_owned(),
        Key::Leader => "leader".to_owned(),
        Key::Lease => "lease".to_owned(),
        Key::Sync => "sync".to_owned(),
        Key::Membership => "membership".to_owned(),
        Key::Timeline(number) => format!("timelines/{number}"),
        Key::Member(member) => format!("members/{member}"),
        Key::Seal(member) => format!("seals/{member}"),
        Key::Request(id) => format!("requests/{}", request_id(id)?),
        Key::History(term) => format!("history/{term}"),
    })
}

fn request_id(id: &str) -> Result<&str, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if (1..=64).contains(&id.len()) && id.chars().all(plain) {
        Ok(id)
    } else {
        Err(format!("`{id}` is not an id of a request: 1 to 64 letters, digits, hyphens or underscores"))
    }
}

/// What a name stands for. `None`: not a name of this version (another part's, or a later version's): not ours to judge.
fn parse_name(name: &str) -> Option<Result<Key, String>> {
    let (family, rest) = match name.split_once('/') {
        Some((family, rest)) => (family, Some(rest)),
        None => (name, None),
    };
    Some(match (family, rest) {
        ("init", None) => Ok(Key::Init),
        ("leader", None) => Ok(Key::Leader),
        ("lease", None) => Ok(Key::Lease),
        ("sync", None) => Ok(Key::Sync),
        ("membership", None) => Ok(Key::Membership),
        ("timelines", Some(number)) => whole_number(number).and_then(|n| match u32::try_from(n) {
            Ok(n) if n > 0 => Ok(Key::Timeline(TimelineId(n))),
            _ => Err(format!("{n} is not a timeline")),
        }),
        ("members", Some(member)) => MemberName::new(member).map(Key::Member).map_err(|e| e.to_string()),
        ("seals", Some(member)) => MemberName::new(member).map(Key::Seal).map_err(|e| e.to_string()),
        ("requests", Some(id)) => request_id(id).map(|id| Key::Request(id.to_owned())),
        ("history", Some(term)) => whole_number(term).map(|n| Key::History(Term(n))),
        _ => return None,
    })
}

/// A number as we write it in a key: `7`, never `07` or `+7`, or two keys would stand for one thing.
fn whole_number(text: &str) -> Result<u64, String> {
    text.parse::<u64>()
        .ok()
        .filter(|n| n.to_string() == text)
        .ok_or_else(|| format!("`{text}` in the key is not a whole number"))
}

// === Reading ===

/// One key as the store holds it; `name` is what follows the cluster's root.
pub struct Found<'a> {
    pub name: &'a [u8],
    pub revision: i64,
    pub value: &'a [u8],
}

/// The objects of the last read by name: from here the fields that we do not know are copied when a key is written again.
pub type Objects = BTreeMap<String, Map<String, Value>>;

/// Everything that one read found, as records. What cannot be read stands in `unreadable` by its name, with the reason;
/// for the five single keys as [`Entry::Unreadable`] too.
pub fn decode<'a>(
    store_id: u64,
    revision: i64,
    found: impl IntoIterator<Item = Found<'a>>,
) -> (ClusterRecords, Objects) {
    let mut reading =
        Reading { records: ClusterRecords { store_id, revision, ..Default::default() }, objects: Objects::new() };
    for key in found {
        reading.take(&key);
    }
    (reading.records, reading.objects)
}

struct Reading {
    records: ClusterRecords,
    objects: Objects,
}

impl Reading {
    fn take(&mut self, found: &Found<'_>) {
        let Ok(name) = std::str::from_utf8(found.name) else {
            let shown = String::from_utf8_lossy(found.name).into_owned();
            self.unreadable(&shown, "the key is not UTF-8");
            return;
        };
        let key = match parse_name(name) {
            Some(Ok(key)) => key,
            Some(Err(why)) => return self.unreadable(name, &why),
            None => return,
        };
        match key {
            Key::Init => self.records.init = self.entry(name, found),
            Key::Leader => self.records.leader = self.entry(name, found),
            Key::Lease => self.records.lease = self.entry(name, found),
            Key::Sync => self.records.sync = self.entry(name, found),
            Key::Membership => self.records.membership = self.entry(name, found),
            Key::Timeline(number) => {
                if let Some(value) = self.value(name, found) {
                    self.records.timelines.insert(number, value);
                }
            }
            Key::Member(member) => {
                if let Some(value) = self.value(name, found) {
                    self.records.members.insert(member, Keyed { revision: found.revision, value });
                }
            }
            Key::Seal(member) => {
                if let Some(value) = self.value(name, found) {
                    self.records.seals.insert(member, Keyed { revision: found.revision, value });
                }
            }
            Key::Request(id) => {
                if let Some(value) = self.value::<Request>(name, found) {
                    if value.id == id {
                        self.records.requests.insert(id, Keyed { revision: found.revision, value });
                    } else {
                        self.unreadable(name, &format!("the value says that it is request `{}`", value.id));
                    }
                }
            }
            Key::History(term) => {
                if let Some(value) = self.value::<HistoryRecord>(name, found) {
                    if value.term == term {
                        self.records.history.insert(term, value);
                    } else {
                        self.unreadable(name, &format!("the value says that it is of term {}", value.term));
                    }
                }
            }
        }
    }

    fn entry<T: DeserializeOwned>(&mut self, name: &str, found: &Found<'_>) -> Entry<T> {
        match self.read(name, found.value) {
            Ok(value) => Entry::Present(Keyed { revision: found.revision, value }),
            Err(why) => {
                self.unreadable(name, &why);
                Entry::Unreadable { revision: found.revision, why: format!("{name}: {why}") }
            }
        }
    }

    fn value<T: DeserializeOwned>(&mut self, name: &str, found: &Found<'_>) -> Option<T> {
        self.read(name, found.value).map_err(|why| self.unreadable(name, &why)).ok()
    }

    fn read<T: DeserializeOwned>(&mut self, name: &str, bytes: &[u8]) -> Result<T, String> {
        let object = object(bytes)?;
        let value = record(&object)?;
        self.objects.insert(name.to_owned(), object);
        Ok(value)
    }

    fn unreadable(&mut self, name: &str, why: &str) {
        self.records.unreadable.insert(name.to_owned(), format!("{name}: {why}"));
    }
}

/// The object of a version that we know.
fn object(bytes: &[u8]) -> Result<Map<String, Value>, String> {
    if bytes.len() > MAX_VALUE {
        return Err(format!("{} bytes, more than the {MAX_VALUE} that a value may have", bytes.len()));
    }
    let object = match serde_json::from_slice(bytes) {
        Ok(Value::Object(object)) => object,
        Ok(_) => return Err("not a JSON object".to_owned()),
        Err(why) => return Err(format!("not JSON: {why}")),
    };
    match object.get("v").map(Value::as_u64) {
        Some(Some(version)) if (1..=VERSION).contains(&version) => Ok(object),
        Some(Some(version)) if version > VERSION => Err(format!(
            "written in format {version} by a newer pgvigil, this one reads format {VERSION}: upgrade this member"
        )),
        Some(_) => Err("`v`, the format's version, is not a whole number above 0".to_owned()),
        None => Err("`v`, the format's version, is missing".to_owned()),
    }
}

fn record<T: DeserializeOwned>(object: &Map<String, Value>) -> Result<T, String> {
    let attempt = |object: &Map<String, Value>| {
        let mut value = Value::Object(object.clone());
        numbers_from_wire(&mut value);
        serde_json::from_value::<T>(value).map_err(|e| e.to_string())
    };
    attempt(object).map_err(|why| {
        // serde does not say in which field a value of a wrong type stands. It is the one without which the complaint is
        // another one; a missing field is complained of last, so good fields can be taken away without a change.
        let culprit = object.keys().find(|field| {
            let mut without = object.clone();
            without.remove(field.as_str());
            attempt(&without).err().as_deref() != Some(&why)
        });
        match culprit {
            Some(field) => format!("field `{field}`: {why}"),
            None => why,
        }
    })
}

// === Writing ===

/// A transaction as an adapter sends it: names below the root, values in bytes.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// For errors: `write leader, sync`.
    pub what: String,
    pub compare: Vec<(String, i64)>,
    /// `None`: the key is deleted.
    pub write: Vec<(String, Option<Vec<u8>>)>,
    /// The objects that stand in the store once this was applied.
    after: Vec<(String, Option<Map<String, Value>>)>,
}

impl Prepared {
    /// Remembers what was written, so that the next write keeps the same unknown fields without a read in between.
    pub fn applied(self, objects: &mut Objects) {
        for (name, object) in self.after {
            match object {
                Some(object) => objects.insert(name, object),
                None => objects.remove(&name),
            };
        }
    }
}

/// What a transaction does, in a few words.
pub fn describe(transaction: &Transaction) -> String {
    let names = |keys: &mut dyn Iterator<Item = Key>| {
        let names: Vec<String> = keys.map(|key| name(&key).unwrap_or_else(|why| why)).collect();
        names.join(", ")
    };
    if transaction.write.is_empty() {
        format!("compare {}", names(&mut transaction.compare.iter().map(|c| c.key.clone())))
    } else {
        format!("write {}", names(&mut transaction.write.iter().map(Write::key)))
    }
}

/// Makes the bytes. An error is a refusal: sending it again would not help.
pub fn prepare(transaction: &Transaction, known: &Objects) -> Result<Prepared, String> {
    let (compares, writes) = (transaction.compare.len(), transaction.write.len());
    if compares > MAX_OPERATIONS || writes > MAX_OPERATIONS {
        return Err(format!("{compares} comparisons and {writes} writes: a transaction has {MAX_OPERATIONS} at most"));
    }
    let mut prepared = Prepared {
        what: describe(transaction),
        compare: Vec::with_capacity(compares),
        write: Vec::with_capacity(writes),
        after: Vec::with_capacity(writes),
    };
    for compare in &transaction.compare {
        prepared.compare.push((name(&compare.key)?, compare.revision));
    }
    let mut seen = BTreeSet::new();
    for write in &transaction.write {
        let name = name(&write.key())?;
        if !seen.insert(name.clone()) {
            return Err(format!("{name} is written twice in one transaction"));
        }
        let object = encode(write, known.get(&name)).map_err(|why| format!("{name}: {why}"))?;
        let bytes = object.as_ref().map(serde_json::to_vec).transpose().map_err(|why| format!("{name}: {why}"))?;
        if let Some(bytes) = &bytes
            && bytes.len() > MAX_VALUE
        {
            return Err(format!("{name}: {} bytes, more than the {MAX_VALUE} that a value may have", bytes.len()));
        }
        prepared.write.push((name.clone(), bytes));
        prepared.after.push((name, object));
    }
    Ok(prepared)
}

fn encode(write: &Write, before: Option<&Map<String, Value>>) -> Result<Option<Map<String, Value>>, String> {
    let mut object = match write {
        Write::Init(record) => fields(record)?,
        Write::Leader(record) => fields(record)?,
        Write::Lease(record) => fields(record)?,
        Write::Sync(record) => fields(record)?,
        Write::Membership(record) => fields(record)?,
        Write::Timeline(_, record) => fields(record)?,
        Write::Member(_, record) => fields(record)?,
        Write::Seal(_, record) => fields(record)?,
        Write::Request(record) => fields(record)?,
        Write::History(record) => fields(record)?,
        Write::Delete(_) => return Ok(None),
    };
    object.insert("v".to_owned(), VERSION.into());
    for (field, value) in before.into_iter().flatten() {
        if !object.contains_key(field) {
            object.insert(field.clone(), value.clone());
        }
    }
    Ok(Some(object))
}

fn fields(record: &impl Serialize) -> Result<Map<String, Value>, String> {
    let mut value = serde_json::to_value(record).map_err(|e| e.to_string())?;
    numbers_to_wire(&mut value);
    match value {
        Value::Object(object) => Ok(object),
        other => Err(format!("a record must be an object, this is {other}")),
    }
}

// === Numbers ===

/// System identifiers always as strings (they are above 2^53 anyway, so the type does not change from cluster to cluster),
/// other numbers when they are too large to be exact.
fn numbers_to_wire(value: &mut Value) {
    match value {
        Value::Object(object) => {
            for (field, value) in object {
                match value {
                    Value::Number(number) if field == "system_identifier" => *value = Value::String(number.to_string()),
                    other => numbers_to_wire(other),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(numbers_to_wire),
        Value::Number(number) if number.as_u64().is_some_and(|n| n > MAX_EXACT) => {
            *value = Value::String(number.to_string());
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Both ways of writing are read, whoever wrote it.
fn numbers_from_wire(value: &mut Value) {
    match value {
        Value::Object(object) => {
            for (field, value) in object {
                match (field.as_str(), &mut *value) {
                    // An operator's own tags: strings whatever they look like.
                    ("custom", _) => {}
                    ("phases_ms", Value::Object(phases)) => phases.values_mut().for_each(number_from_wire),
                    (field, Value::String(_)) if WIDE.contains(&field) => number_from_wire(value),
                    (_, other) => numbers_from_wire(other),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(numbers_from_wire),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn number_from_wire(value: &mut Value) {
    if let Value::String(text) = value
        && let Ok(number) = whole_number(text)
    {
        *value = number.into();
    }
}

#[cfg(test)]
mod tests;
