//! Lists that a key can hold: numbers such as GPUs and users, and plain names.

use toml::de::DeValue;

use super::keys::Key;
use super::problem::quoted;
use super::value::{Fault, Kind, Value};

/// Most entries of a list.
const ENTRIES_MAX: usize = 1_024;
/// Longest plain name.
const NAME_BYTES_MAX: usize = 32;

fn fault<T>(what: String, instead: impl Into<String>) -> Result<T, Fault> {
    Err(Fault {
        what,
        instead: instead.into(),
    })
}

/// Reads a list from a TOML document; none if the kind is no list of this module.
pub(super) fn read_toml(
    kind: Kind,
    key: &Key,
    value: &DeValue<'_>,
) -> Option<Result<Value, Fault>> {
    let (Kind::Numbers { .. } | Kind::Names) = kind else {
        return None;
    };
    let text = match value {
        DeValue::Integer(number) if kind != Kind::Names => Some(number.as_str().to_owned()),
        DeValue::String(text) => Some(text.clone().into_owned()),
        DeValue::Array(items) => {
            let items = items.iter().map(|item| match item.get_ref() {
                DeValue::Integer(number) if kind != Kind::Names => Some(number.as_str()),
                DeValue::String(text) => Some(&**text),
                _ => None,
            });
            items
                .collect::<Option<Vec<&str>>>()
                .map(|items| items.join(","))
        }
        _ => None,
    };
    Some(match text {
        Some(text) => kind.read_text(key, &text),
        None => fault(
            format!("{} must be a list", key.name),
            format!("write {} = {}", key.name, kind.example()),
        ),
    })
}

/// Reads `0-3,5`.
pub(super) fn numbers(key: &Key, max: u32, text: &str) -> Result<Value, Fault> {
    let number = |text: &str| match text.bytes().all(|byte| byte.is_ascii_digit()) {
        true => text.parse::<u32>().ok().filter(|number| *number <= max),
        false => None,
    };
    let mut numbers: Vec<u32> = Vec::new();
    for part in text.split(',').map(str::trim) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Some(first), Some(last)) = (number(first), number(last)) else {
            return fault(
                format!(
                    "{} has {}, which is no number up to {max}, nor a range of them",
                    key.name,
                    quoted(part)
                ),
                r#"write numbers and ranges with commas between, such as "0-3,5""#,
            );
        };
        if first > last {
            return fault(
                format!("{} has the range {part}, which runs backwards", key.name),
                format!("write {last}-{first}"),
            );
        }
        if (last - first) as usize >= ENTRIES_MAX || numbers.len() >= ENTRIES_MAX {
            return fault(
                format!("{} is longer than {ENTRIES_MAX} entries", key.name),
                "write fewer",
            );
        }
        if let Some(twice) = (first..=last).find(|number| numbers.contains(number)) {
            return fault(format!("{} has {twice} twice", key.name), "write it once");
        }
        numbers.extend(first..=last);
    }
    numbers.sort_unstable();
    Ok(Value::Numbers(numbers))
}

/// Reads `weights,kv_cache`: names that may stand in the name of a file.
pub(super) fn names(key: &Key, text: &str) -> Result<Value, Fault> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    let mut names: Vec<String> = Vec::new();
    for name in text.split(',').map(str::trim) {
        let right = (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(plain);
        if !right {
            return fault(
                format!("{} has {}, which is no plain name", key.name, quoted(name)),
                format!("write 1 to {NAME_BYTES_MAX} letters, digits, _ and -"),
            );
        }
        if names.iter().any(|other| other == name) {
            return fault(
                format!("{} has {} twice", key.name, quoted(name)),
                "write it once",
            );
        }
        names.push(name.to_owned());
    }
    if names.len() > ENTRIES_MAX {
        return fault(
            format!("{} is longer than {ENTRIES_MAX} entries", key.name),
            "write fewer",
        );
    }
    Ok(Value::List(names))
}

#[cfg(test)]
mod tests {
    use super::super::keys;
    use super::*;

    #[test]
    fn numbers_are_singles_and_ranges() {
        let key = &keys::GPU_DEVICES;
        let read = |text: &str| numbers(key, 63, text);
        assert_eq!(read("5, 0-2"), Ok(Value::Numbers(vec![0, 1, 2, 5])));
        for (text, said) in [
            ("64", "no number up to 63"),
            ("-1", "no number up to 63"),
            ("a", "\"a\""),
            ("3-1", "write 1-3"),
            ("0-2,1", "1 twice"),
        ] {
            let fault = read(text).unwrap_err();
            let text = format!("{}; {}", fault.what, fault.instead);
            assert!(text.contains(said), "{text}");
        }
        let long = numbers(key, u32::MAX, "0-4000000000").unwrap_err();
        assert!(long.what.contains("longer than"), "{}", long.what);
    }

    #[test]
    fn names_are_plain_and_single() {
        let key = &keys::GPU_TAGS;
        let list = Value::List(vec!["weights".into(), "kv-2".into()]);
        assert_eq!(names(key, "weights, kv-2"), Ok(list));
        for text in ["", "a,,b", "a/b", "a,a", "..", &"x".repeat(33)] {
            assert!(names(key, text).is_err(), "{text}");
        }
    }
}
