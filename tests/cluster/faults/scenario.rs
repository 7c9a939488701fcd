//! A fault as a file: what is done, what is waited for, what must come of it. `README.md` beside the files has the words.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// The file's name without its ending.
    #[serde(skip)]
    pub name: String,
    /// Numbers of the catalogue of faults.
    pub faults: Vec<u16>,
    pub title: String,
    /// Part of what scripts/test runs.
    #[serde(default)]
    pub ci: bool,
    /// Why it cannot be injected on such a machine.
    pub skip: Option<String>,
    /// A part of the product that is not there yet: reported, not run.
    pub needs: Option<String>,
    #[serde(default)]
    pub setup: Setup,
    #[serde(default)]
    pub steps: Vec<String>,
    #[serde(default)]
    pub expect: Expect,
}

/// Scenarios with the same one are played on one cluster, one after the other.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Setup {
    pub mode: String,
    pub members: usize,
    /// Lines of [lease]; else half of the default, for half the waiting.
    pub lease: Option<String>,
    /// Lines of [postgresql.parameters].
    pub parameters: String,
    /// Lines for every member's configuration, below `all`, and for single ones below their names.
    pub settings: BTreeMap<String, String>,
    /// Nothing is played after it on this cluster.
    pub alone: bool,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            mode: "sync".to_owned(),
            members: 3,
            lease: None,
            parameters: String::new(),
            settings: BTreeMap::new(),
            alone: false,
        }
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Expect {
    /// `same` or `changed`, when everything is healed; nothing: either.
    pub primary: Option<Change>,
    /// The term, likewise.
    pub term: Option<Change>,
    /// The primary's postmaster, likewise.
    pub postmaster: Option<Change>,
    /// Longest time without an acknowledged write, from the first fault to the end of the steps.
    #[serde(default, deserialize_with = "duration")]
    pub outage: Option<Duration>,
    /// Some agent's log says each of these.
    pub says: Vec<String>,
    /// No agent's log says any of these.
    pub never_says: Vec<String>,
    /// What else would be a fault of its own: `reclone` (a data directory was set aside), `agent-ends`.
    pub allow: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    Same,
    Changed,
}

fn duration<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(deserializer)?;
    time(&text).map(Some).map_err(serde::de::Error::custom)
}

/// `300ms`, `15s`, `2min`.
pub fn time(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..split].parse().map_err(|_| format!("`{text}` is no duration: write 300ms, 15s, 2min"))?;
    match &text[split..] {
        "ms" => Ok(Duration::from_millis(number)),
        "s" => Ok(Duration::from_secs(number)),
        "min" => Ok(Duration::from_secs(60 * number)),
        _ => Err(format!("`{text}` is no duration: write 300ms, 15s, 2min")),
    }
}

// === Steps ===

#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// kill, stop, continue, terminate, quit WHO [WHAT]
    Signal {
        signal: nix::sys::signal::Signal,
        who: String,
        what: Option<String>,
    },
    PowerOff(String),
    Start(String),
    /// Orderly, by SIGTERM to the agent; waits for its end.
    Leave(String),
    Freeze(String),
    Thaw(String),
    Cut {
        who: String,
        from: Option<String>,
        way: Way,
        port: Option<Port>,
    },
    Lose {
        who: String,
        percent: u8,
    },
    LongerThan {
        who: String,
        bytes: u16,
    },
    Rate {
        who: String,
        kbytes: u32,
    },
    Heal(String),
    FreezeDisk(String),
    ThawDisk(String),
    FillDisk(String),
    EmptyDisk(String),
    LimitProcesses {
        who: String,
        more: u64,
    },
    /// garble, remove, truncate WHO PATH: below the member's directory, `data/…` is PGDATA, `*` the newest of several.
    File {
        how: FileFault,
        who: String,
        path: String,
    },
    /// write WHO PATH TEXT
    Write {
        who: String,
        path: String,
        text: String,
    },
    Sql {
        who: String,
        statement: String,
        how: SqlHow,
    },
    EtcdDelete(String),
    EtcdPut {
        key: String,
        text: String,
    },
    EtcdWipe,
    EtcdSave,
    EtcdRestore,
    EtcdCompact,
    /// NOSPACE: writes are refused.
    EtcdFull,
    EtcdRoom,
    /// An empty etcd at the old addresses.
    EtcdReplace,
    /// flood WHO postgres|agents COUNT: connections that say nothing, until the end of the steps.
    Flood {
        who: String,
        port: Port,
        count: usize,
    },
    /// Runs beside the cluster until the steps are over.
    Spawn {
        who: String,
        command: String,
    },
    /// Has to succeed (`shell`), or to fail and say so (`fails WHO COMMAND => TEXT`).
    Shell {
        who: String,
        command: String,
        fails: Option<String>,
    },
    /// Data and state of a member that is down, copied and put back.
    Save(String),
    Restore(String),
    Unmount(String),
    Mount(String),
    Promote(String),
    /// A person gives the data of a member up.
    Reinit(String),
    Switchover {
        to: Option<String>,
    },
    Refused {
        to: Option<String>,
        text: String,
    },
    Wait {
        until: Condition,
        within: Duration,
    },
    Hold {
        while_: Option<Condition>,
        for_: Duration,
    },
    Repeat {
        times: u32,
        steps: Vec<Step>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Way {
    Both,
    Incoming,
    Outgoing,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Port {
    Postgres,
    Agents,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum FileFault {
    Garble,
    Truncate,
    Remove,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SqlHow {
    /// It has to succeed.
    Run,
    /// Whatever comes of it.
    Try,
    /// Its session stays open until the end of the steps.
    Keep,
    /// Started, not waited for.
    Background,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Condition {
    /// Another member than at the beginning leads.
    Changed,
    /// The same one leads.
    Same,
    Primary,
    Leaderless,
    Writes,
    NoWrites,
    Healthy,
    Says {
        who: String,
        text: String,
    },
    Down {
        who: String,
    },
    Gone {
        who: String,
        what: String,
    },
    Streams {
        who: String,
    },
}

pub const ROLES: [&str; 9] =
    ["primary", "standby", "other", "standbys", "leader", "all", "everybody", "etcd", "clients"];
const STORES: [&str; 6] = ["etcd-1", "etcd-2", "etcd-3", "etcd-leader", "etcd-follower", "etcd-majority"];
pub const WHATS: [&str; 11] = [
    "agent",
    "guardian",
    "postmaster",
    "backend",
    "walsender",
    "walreceiver",
    "startup",
    "checkpointer",
    "walwriter",
    "postgres",
    "everything",
];

fn who(text: &str) -> Result<String, String> {
    let known =
        ROLES.contains(&text) || STORES.contains(&text) || text.strip_prefix("node-").is_some_and(|n| n.len() == 1);
    known
        .then(|| text.to_owned())
        .ok_or_else(|| format!("`{text}` is nobody: {} {} node-a", ROLES.join(" "), STORES.join(" ")))
}

fn what(text: &str) -> Result<String, String> {
    WHATS.contains(&text).then(|| text.to_owned()).ok_or_else(|| format!("`{text}` is no process: {}", WHATS.join(" ")))
}

pub fn parse(text: &str) -> Result<Step, String> {
    use nix::sys::signal::Signal;
    if let Some(rest) = text.strip_prefix("repeat ") {
        let (times, steps) = rest.split_once(':').ok_or_else(|| format!("{text}: write `repeat 5: STEP; STEP`"))?;
        let times = times.trim().parse().map_err(|_| format!("{text}: `{times}` is no number"))?;
        let steps = steps.split(';').map(|step| parse(step.trim())).collect::<Result<_, _>>()?;
        return Ok(Step::Repeat { times, steps });
    }
    let words: Vec<&str> = text.split_whitespace().collect();
    // The rest of the line after so many words, as it was written.
    let after = |count: usize| {
        let mut rest = text.trim_start();
        for _ in 0..count {
            rest = rest.split_once(char::is_whitespace).map_or("", |(_, rest)| rest.trim_start());
        }
        rest.to_owned()
    };
    let number = |text: &str, unit: &str| {
        text.strip_suffix(unit)
            .and_then(|n| n.parse::<u32>().ok())
            .ok_or_else(|| format!("`{text}`: write a number with {unit}"))
    };
    let signal = |word: &str| match word {
        "kill" => Some(Signal::SIGKILL),
        "stop" => Some(Signal::SIGSTOP),
        "continue" => Some(Signal::SIGCONT),
        "terminate" => Some(Signal::SIGTERM),
        "quit" => Some(Signal::SIGQUIT),
        // The agent ends, PostgreSQL stays: how systemd restarts it.
        "detach" => Some(Signal::SIGUSR1),
        _ => None,
    };
    let step = match words[..] {
        [verb, w] if signal(verb).is_some() => {
            Step::Signal { signal: signal(verb).unwrap_or(Signal::SIGKILL), who: who(w)?, what: None }
        }
        [verb, w, p] if signal(verb).is_some() => {
            Step::Signal { signal: signal(verb).unwrap_or(Signal::SIGKILL), who: who(w)?, what: Some(what(p)?) }
        }
        ["power-off", w] => Step::PowerOff(who(w)?),
        ["start", w] => Step::Start(who(w)?),
        ["leave", w] => Step::Leave(who(w)?),
        ["freeze", w] => Step::Freeze(who(w)?),
        ["thaw", w] => Step::Thaw(who(w)?),
        ["cut", w, ref rest @ ..] => cut(who(w)?, rest).map_err(|why| format!("{text}: {why}"))?,
        ["lose", w, percent] => {
            Step::Lose { who: who(w)?, percent: u8::try_from(number(percent, "%")?).map_err(|e| e.to_string())? }
        }
        ["longer-than", w, bytes] => {
            Step::LongerThan { who: who(w)?, bytes: u16::try_from(number(bytes, "B")?).map_err(|e| e.to_string())? }
        }
        ["rate", w, rate] => Step::Rate { who: who(w)?, kbytes: number(rate, "kB/s")? },
        ["heal", w] => Step::Heal(who(w)?),
        ["freeze-disk", w] => Step::FreezeDisk(who(w)?),
        ["thaw-disk", w] => Step::ThawDisk(who(w)?),
        ["fill-disk", w] => Step::FillDisk(who(w)?),
        ["empty-disk", w] => Step::EmptyDisk(who(w)?),
        ["limit-processes", w, more] => {
            Step::LimitProcesses { who: who(w)?, more: more.parse().map_err(|_| format!("{text}: no number"))? }
        }
        ["garble", w, path] => Step::File { how: FileFault::Garble, who: who(w)?, path: path.to_owned() },
        ["truncate", w, path] => Step::File { how: FileFault::Truncate, who: who(w)?, path: path.to_owned() },
        ["remove", w, path] => Step::File { how: FileFault::Remove, who: who(w)?, path: path.to_owned() },
        ["write", w, path, ..] => Step::Write { who: who(w)?, path: path.to_owned(), text: after(3) },
        ["sql", w, ..] => Step::Sql { who: who(w)?, statement: after(2), how: SqlHow::Run },
        ["try-sql", w, ..] => Step::Sql { who: who(w)?, statement: after(2), how: SqlHow::Try },
        ["keep-sql", w, ..] => Step::Sql { who: who(w)?, statement: after(2), how: SqlHow::Keep },
        ["begin-sql", w, ..] => Step::Sql { who: who(w)?, statement: after(2), how: SqlHow::Background },
        ["etcd-delete", key] => Step::EtcdDelete(key.to_owned()),
        ["etcd-put", key, ..] => Step::EtcdPut { key: key.to_owned(), text: after(2) },
        ["etcd-wipe"] => Step::EtcdWipe,
        ["etcd-save"] => Step::EtcdSave,
        ["etcd-restore"] => Step::EtcdRestore,
        ["etcd-compact"] => Step::EtcdCompact,
        ["etcd-full"] => Step::EtcdFull,
        ["etcd-room"] => Step::EtcdRoom,
        ["etcd-replace"] => Step::EtcdReplace,
        ["flood", w, p @ ("postgres" | "agents"), count] => Step::Flood {
            who: who(w)?,
            port: if p == "postgres" { Port::Postgres } else { Port::Agents },
            count: count.parse().map_err(|_| format!("{text}: `{count}` is no number"))?,
        },
        ["spawn", w, ..] => Step::Spawn { who: who(w)?, command: after(2) },
        ["shell", w, ..] => Step::Shell { who: who(w)?, command: after(2), fails: None },
        ["fails", w, ..] => {
            let line = after(2);
            let (command, words) =
                line.rsplit_once(" => ").ok_or_else(|| format!("{text}: write `=> TEXT` behind it"))?;
            Step::Shell { who: who(w)?, command: command.to_owned(), fails: Some(words.to_owned()) }
        }
        ["save", w] => Step::Save(who(w)?),
        ["restore", w] => Step::Restore(who(w)?),
        ["unmount", w] => Step::Unmount(who(w)?),
        ["mount", w] => Step::Mount(who(w)?),
        ["reinit", w] => Step::Reinit(who(w)?),
        ["promote", w] => Step::Promote(who(w)?),
        ["switchover"] => Step::Switchover { to: None },
        ["switchover", w] => Step::Switchover { to: Some(who(w)?) },
        ["refused", "switchover", w, ..] => Step::Refused { to: Some(who(w)?), text: after(3) },
        ["wait", ref rest @ .., within] => Step::Wait { until: condition(rest, &after)?, within: time(within)? },
        ["hold", for_] => Step::Hold { while_: None, for_: time(for_)? },
        ["hold", ref rest @ .., for_] => Step::Hold { while_: Some(condition(rest, &after)?), for_: time(for_)? },
        _ => return Err(format!("`{text}` is no step: README.md beside the scenarios has the words")),
    };
    Ok(step)
}

fn cut(who_: String, mut rest: &[&str]) -> Result<Step, String> {
    let (mut from, mut way, mut port) = (None, Way::Both, None);
    while let [word, more @ ..] = rest {
        rest = more;
        match (*word, more) {
            ("from", [peer, more @ ..]) => {
                from = Some(who(peer)?);
                rest = more;
            }
            ("incoming", _) => way = Way::Incoming,
            ("outgoing", _) => way = Way::Outgoing,
            ("postgres", _) => port = Some(Port::Postgres),
            ("agents", _) => port = Some(Port::Agents),
            _ => return Err(format!("`{word}`: write [from WHO] [incoming|outgoing] [postgres|agents]")),
        }
    }
    Ok(Step::Cut { who: who_, from, way, port })
}

fn condition(words: &[&str], after: &impl Fn(usize) -> String) -> Result<Condition, String> {
    Ok(match words {
        ["changed"] => Condition::Changed,
        ["same"] => Condition::Same,
        ["primary"] => Condition::Primary,
        ["leaderless"] => Condition::Leaderless,
        ["writes"] => Condition::Writes,
        ["no-writes"] => Condition::NoWrites,
        ["healthy"] => Condition::Healthy,
        ["down", w] => Condition::Down { who: who(w)? },
        ["streams", w] => Condition::Streams { who: who(w)? },
        ["gone", w, p] => Condition::Gone { who: who(w)?, what: what(p)? },
        ["says", w, ..] => {
            // Without `wait says WHO` before it and the limit behind it.
            let text = after(3);
            let text = text.rsplit_once(char::is_whitespace).map_or("", |(text, _)| text.trim());
            Condition::Says { who: who(w)?, text: text.to_owned() }
        }
        _ => return Err(format!("`{}` is nothing to wait for: README.md beside the scenarios", words.join(" "))),
    })
}

impl Scenario {
    pub fn plan(&self) -> Result<Vec<Step>, String> {
        self.steps.iter().map(|step| parse(step)).collect()
    }

    /// Why it is not played, if it is not.
    pub fn skipped(&self) -> Option<String> {
        let needs = self.needs.as_ref().map(|part| format!("not yet: needs {part}"));
        self.skip.clone().or(needs)
    }
}

/// All files, in the order of their names; an error names the file.
pub fn load(directory: &Path) -> Result<Vec<Scenario>, String> {
    let entries = std::fs::read_dir(directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|ending| ending == "toml"));
    files.sort();
    files.iter().map(|file| read(file)).collect()
}

fn read(file: &Path) -> Result<Scenario, String> {
    let failed = |why: String| format!("{}: {why}", file.display());
    let text = std::fs::read_to_string(file).map_err(|error| failed(error.to_string()))?;
    let mut scenario: Scenario = toml::from_str(&text).map_err(|error| failed(error.to_string()))?;
    scenario.name = file.file_stem().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    scenario.plan().map_err(failed)?;
    if scenario.skip.is_none() && scenario.steps.is_empty() {
        return Err(failed("it has no steps: write them, or `skip` with the reason".to_owned()));
    }
    Ok(scenario)
}
