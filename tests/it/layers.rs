//! Who may know what: the layer table of docs/ARCHITECTURE.md §1, held against every `crate::` path under `src/`.
//!
//! Reads the text, not the types: comments, strings and `#[cfg(test)]` items do not count; `use crate::{a, b::c}` and
//! `super::` that leaves its module do. A path written inside a macro of another crate would be missed.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// Module, and what it may import besides itself. A longer path is narrower: `agent::status` is not `agent`.
/// Keep it equal to the table of docs/ARCHITECTURE.md §1.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("core", &[]),
    ("ports", &["core"]),
    ("config", &["core"]),
    ("telemetry", &["core", "config"]),
    ("dcs", &["ports", "config", "core"]),
    ("postgres", &["ports", "config", "core"]),
    // The fence speaks to the guardian in the guardian's own words.
    ("fencing", &["ports", "config", "core", "guardian"]),
    // Shared memory is the guardian's: the one file with unsafe code.
    ("storage", &["ports", "config", "core", "guardian"]),
    ("peers", &["ports", "config", "core"]),
    ("agent", &["ports", "config", "core"]),
    ("api", &["ports", "config", "core", "agent::status"]),
    // The agent's side reads what the agent publishes; the gate reads the guardian's page; the router asks agents.
    ("endpoint", &["ports", "config", "core", "client", "agent::status", "guardian", "telemetry"]),
    ("guardian", &[]),
    // The API's client: speaks JSON, knows no other part.
    ("client", &["config"]),
    ("cli", &["app", "client", "config", "core", "demo", "endpoint", "api", "agent::status", "guardian", "telemetry"]),
    // Of the guardian its words only: a deadline is asked for where its agent is stopped.
    ("demo", &["client", "config", "core", "guardian::wire", "fencing::control_group_name"]),
    ("app", ALL),
    ("main", ALL),
    ("lib", ALL),
];
const ALL: &[&str] = &["*"];

/// Words that a part must not hold outside its tests, with the reason that the message gives.
const MUST_NOT_SAY: &[(&str, &[&str], &str)] = &[
    ("core", &["async ", ".await", "tokio", "async_trait"], "core is not async"),
    ("core", &["std::time::Instant", "time::Instant", "SystemTime"], "core takes `now` as a parameter"),
    ("core", &["tracing", "println!", "eprintln!", "log::"], "core does not log: its reasons are data"),
    ("core", &["std::fs", "std::env", "std::net", "std::process", "std::thread"], "core does no I/O"),
    ("core", &[".unwrap()", "panic!("], "core does not panic"),
    ("guardian", &["async ", ".await", "tokio", "tracing", "serde", "anyhow"], "the guardian is std, nix and libc"),
];

#[derive(Debug, PartialEq)]
struct Violation {
    file: String,
    line: usize,
    what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {} (docs/ARCHITECTURE.md §1)", self.file, self.line, self.what)
    }
}

#[test]
fn layers_are_respected() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = rust_files(&root.join("src"));
    assert!(files.len() > 20, "only {} files found under src/: is the test looking at the right place?", files.len());
    let test_only = files_behind_cfg_test(&files);
    let mut violations = Vec::new();
    for path in files.iter().filter(|path| !test_only.contains(path)) {
        let name = path.strip_prefix(root).expect("found below the root").to_string_lossy().into_owned();
        let text = fs::read_to_string(path).expect("a source file is readable");
        violations.extend(check(&name, &text));
    }
    let list: Vec<String> = violations.iter().map(Violation::to_string).collect();
    assert!(list.is_empty(), "{} line(s) break the layers:\n{}", list.len(), list.join("\n"));
}

#[test]
fn layers_test_sees_what_it_is_there_for() {
    let found = |file: &str, text: &str| check(file, text).iter().map(|v| (v.line, v.what.clone())).collect::<Vec<_>>();
    let lines = |file: &str, text: &str| found(file, text).iter().map(|(line, _)| *line).collect::<Vec<_>>();

    assert_eq!(lines("src/core/lease.rs", "use super::records::X;\nuse crate::ports::Dcs;\n"), [2]);
    assert_eq!(lines("src/core/rules/leader.rs", "use super::super::super::agent::run;"), [1]);
    assert_eq!(lines("src/dcs/etcd.rs", "use crate::{\n    core::Lsn,\n    postgres::{session, observe},\n};"), [3, 3]);
    assert_eq!(lines("src/api/mod.rs", "use crate::agent::status::Status;\nuse crate::agent::run;"), [2]);
    assert_eq!(lines("src/api/mod.rs", "use crate::agent::{status::Status, run};"), [1]);
    assert_eq!(lines("src/guardian/wire.rs", "fn f() { let x = crate::core::Lsn(1); }"), [1]);
    assert_eq!(lines("src/core/lsn.rs", "fn f() {\n x.unwrap();\n}"), [2]);
    assert_eq!(lines("src/core/time.rs", "use std::time::{Duration, Instant};\n"), [1]);

    for (file, fine) in [
        (
            "src/core/lease.rs",
            "// crate::agent and tokio\n/* .unwrap() /* nested */ */ const A: &str = \"crate::ports\";",
        ),
        (
            "src/core/lease.rs",
            "const A: &str = r#\"crate::ports \" tokio\"#; const B: char = '\"'; fn f<'a>(x: &'a str) {}",
        ),
        ("src/core/lease.rs", "#[cfg(test)]\nmod tests {\n use crate::config::Config;\n fn f() { x.unwrap(); }\n}"),
        ("src/agent/run.rs", "use crate::agent::jobs;\nuse crate::ports::{Dcs, Fence};\nuse super::observe;"),
        ("src/app.rs", "use crate::dcs::etcd;\nuse crate::agent;"),
        ("src/postgres/mod.rs", "pub(crate) mod observe;\npub(in crate::postgres) fn f() {}"),
    ] {
        assert_eq!(found(file, fine), [], "{file}: {fine}");
    }
    let message = check("src/core/lsn.rs", "use crate::dcs::Etcd;")[0].to_string();
    assert!(message.contains("src/core/lsn.rs:1: core may not import dcs::Etcd"), "{message}");
}

// === The check ===

fn check(file: &str, text: &str) -> Vec<Violation> {
    let module = module_path(file);
    let part = module.first().map_or("lib", String::as_str);
    let code = without_tests(&without_comments_and_strings(text));
    let mut violations = Vec::new();
    let mut report = |offset: usize, what: String| {
        violations.push(Violation { file: file.to_owned(), line: code[..offset].matches('\n').count() + 1, what });
    };

    match MAY_IMPORT.iter().find(|(name, _)| *name == part) {
        None => report(0, format!("{part} has no row in the layer table: add one there and in tests/it/layers.rs")),
        Some((_, allowed)) => {
            for (offset, path) in crate_paths(&code, &module) {
                if !may_import(part, allowed, &path) {
                    let list = if allowed.is_empty() { "nothing".to_owned() } else { allowed.join(", ") };
                    report(
                        offset,
                        format!("{part} may not import {}; besides itself it may import {list}", path.join("::")),
                    );
                }
            }
        }
    }
    for (name, words, reason) in MUST_NOT_SAY.iter().filter(|(name, ..)| *name == part) {
        for word in *words {
            for (offset, _) in code.match_indices(word).filter(|(at, _)| begins_a_word(&code, *at, word)) {
                report(offset, format!("{name} holds `{}`: {reason}", word.trim()));
            }
        }
    }
    // `use std::time::{…, Instant}` is the same import in other words.
    if part == "core" {
        for (offset, _) in code.match_indices("std::time::{") {
            let group = code[offset..].split('}').next().unwrap_or_default();
            if group.contains("Instant") || group.contains("SystemTime") {
                report(
                    offset,
                    "core holds a clock in `use std::time::{…}`: core takes `now` as a parameter".to_owned(),
                );
            }
        }
    }
    violations.sort_by_key(|violation| violation.line);
    violations
}

fn may_import(part: &str, allowed: &[&str], path: &[String]) -> bool {
    let target = &path[0];
    // Items of the crate's root and of ourselves are nobody's layer.
    if target == part || !MAY_IMPORT.iter().any(|(name, _)| name == target) {
        return true;
    }
    allowed.iter().any(|rule| {
        let rule: Vec<&str> = rule.split("::").collect();
        rule == ["*"] || (path.len() >= rule.len() && rule.iter().zip(path).all(|(rule, segment)| rule == segment))
    })
}

/// `src/core/rules/leader.rs` → core, rules, leader.
fn module_path(file: &str) -> Vec<String> {
    let inner = file.trim_start_matches("src/").trim_end_matches(".rs");
    let mut path: Vec<String> = inner.split('/').map(str::to_owned).collect();
    if path.len() > 1 && path.last().is_some_and(|last| last == "mod") {
        path.pop();
    }
    path
}

/// Every path from the crate's root, with its offset: `crate::…`, `super::…` that climbs to the root, groups unfolded.
fn crate_paths(code: &str, module: &[String]) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    for (offset, _) in code.match_indices("crate::").filter(|(at, word)| begins_a_word(code, *at, word)) {
        // `pub(in crate::x)` is visibility, not an import.
        if !code[..offset].trim_end().ends_with("(in") {
            unfold(code, offset + "crate::".len(), &[], &mut found);
        }
    }
    for (offset, _) in code.match_indices("super::").filter(|(at, word)| begins_a_word(code, *at, word)) {
        if code[..offset].ends_with("super::") {
            continue; // the inner part of one already seen
        }
        let mut climbed = 0;
        let mut at = offset;
        while code[at..].starts_with("super::") {
            climbed += 1;
            at += "super::".len();
        }
        if climbed == module.len() {
            unfold(code, at, &[], &mut found);
        }
    }
    found
}

/// Reads `a::b::{c, d::e}` from `at` on and adds one path per leaf.
fn unfold(code: &str, mut at: usize, before: &[String], found: &mut Vec<(usize, Vec<String>)>) -> usize {
    let bytes = code.as_bytes();
    let mut path = before.to_vec();
    let start = at;
    loop {
        at += code[at..].len() - code[at..].trim_start().len();
        match bytes.get(at) {
            Some(b'{') => {
                at += 1;
                loop {
                    at += code[at..].len() - code[at..].trim_start().len();
                    match bytes.get(at) {
                        Some(b',') => at += 1,
                        Some(b'}') | None => return at + 1,
                        Some(_) => {
                            let next = unfold(code, at, &path, found);
                            at = next.max(at + 1);
                        }
                    }
                }
            }
            Some(byte) if byte.is_ascii_alphanumeric() || *byte == b'_' => {
                let length = code[at..].find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(code.len() - at);
                path.push(code[at..at + length].to_owned());
                at += length;
                if code[at..].starts_with("::") {
                    at += 2;
                    continue;
                }
            }
            // `*`, or the turbofish of an expression.
            _ => {}
        }
        if path.len() > before.len() || path.len() > 1 {
            found.push((start, path));
        }
        // `a as b` inside a group: on to the comma or the end of the group.
        if !before.is_empty() {
            at += code[at..].find([',', '}', ';']).unwrap_or(code.len() - at);
        }
        return at;
    }
}

fn begins_a_word(code: &str, at: usize, word: &str) -> bool {
    let joins = |c: char| c.is_alphanumeric() || c == '_' || c == '$';
    !word.starts_with(joins) || !code[..at].ends_with(joins)
}

// === The text ===

/// The same text with comments and the insides of literals blanked; offsets and lines stay.
fn without_comments_and_strings(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    let blank = |out: &mut Vec<u8>, from: usize, to: usize| {
        for byte in &mut out[from..to] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
    };
    while at < bytes.len() {
        let rest = &bytes[at..];
        let end = if rest.starts_with(b"//") {
            at + rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len())
        } else if rest.starts_with(b"/*") {
            end_of_block_comment(bytes, at)
        } else if let Some(end) = end_of_raw_string(bytes, at) {
            end
        } else if rest[0] == b'"' {
            end_of_quoted(bytes, at, b'"')
        } else if rest[0] == b'\'' && (rest.get(1) == Some(&b'\\') || char_literal(text, at)) {
            end_of_quoted(bytes, at, b'\'')
        } else {
            at += 1;
            continue;
        };
        blank(&mut out, at, end);
        at = end;
    }
    String::from_utf8(out).expect("only whole literals and comments were blanked")
}

fn end_of_block_comment(bytes: &[u8], start: usize) -> usize {
    let (mut at, mut depth) = (start, 0);
    while at < bytes.len() {
        if bytes[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if bytes[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    bytes.len()
}

fn end_of_raw_string(bytes: &[u8], start: usize) -> Option<usize> {
    if bytes[start] != b'r' || (start > 0 && (bytes[start - 1].is_ascii_alphanumeric() && bytes[start - 1] != b'b')) {
        return None;
    }
    let hashes = bytes[start + 1..].iter().take_while(|b| **b == b'#').count();
    if bytes.get(start + 1 + hashes) != Some(&b'"') {
        return None;
    }
    let closing: Vec<u8> = std::iter::once(b'"').chain(std::iter::repeat_n(b'#', hashes)).collect();
    let inside = start + 2 + hashes;
    let length = bytes[inside..].windows(closing.len()).position(|window| window == closing)?;
    Some(inside + length + closing.len())
}

fn end_of_quoted(bytes: &[u8], start: usize, quote: u8) -> usize {
    let mut at = start + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            byte if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// `'x'` and not the lifetime `'x`.
fn char_literal(text: &str, at: usize) -> bool {
    let mut characters = text[at + 1..].chars();
    characters.next().is_some() && characters.next() == Some('\'')
}

/// Blanks every item behind `#[cfg(test)]`, to its closing brace or semicolon.
fn without_tests(code: &str) -> String {
    let mut out = code.to_owned();
    while let Some(start) = out.find("#[cfg(test)]") {
        let mut depth = 0;
        let after = start + "#[cfg(test)]".len();
        let length = out[after..].bytes().position(|byte| {
            match byte {
                b'{' => depth += 1,
                b'}' => depth -= 1,
                _ => {}
            }
            depth == 0 && matches!(byte, b'}' | b';')
        });
        let end = length.map_or(out.len(), |length| after + length + 1);
        let blank: String = out[start..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect();
        out.replace_range(start..end, &blank);
    }
    out
}

fn rust_files(below: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(below).expect("src/ is readable") {
        let path = entry.expect("src/ is readable").path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// Files that only `#[cfg(test)] mod name;` brings in.
fn files_behind_cfg_test(files: &[PathBuf]) -> Vec<PathBuf> {
    let mut behind = Vec::new();
    for file in files {
        let text = fs::read_to_string(file).expect("a source file is readable");
        let code = without_comments_and_strings(&text);
        for (at, marker) in code.match_indices("#[cfg(test)]") {
            let item = code[at + marker.len()..].split([';', '{']).next().unwrap_or_default();
            let Some(name) = item.split_whitespace().skip_while(|word| *word != "mod").nth(1) else { continue };
            let beside = file.parent().expect("a file has a directory");
            let stem = file.file_stem().expect("a file has a name").to_string_lossy().into_owned();
            let inner = if stem == "mod" || stem == "lib" { beside.to_owned() } else { beside.join(stem) };
            behind.push(inner.join(format!("{name}.rs")));
            behind.push(inner.join(name).join("mod.rs"));
        }
    }
    behind
}
