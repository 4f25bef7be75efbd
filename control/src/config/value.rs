//! The types that a key can have: how a value is read from TOML or from one line of text, and what
//! is said when it cannot be.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use corelane_codec::path::TcpTransport;
use corelane_engine::nic::QueueName;
use toml::de::DeValue;

use super::host::cpu_list;
use super::keys::Key;
use super::lists;
use super::problem::quoted;
use super::suggest::nearest;
use super::words::Switch;
use crate::words::Word;

/// CPU numbers end here: more than the kernel can be built for.
const CPUS_MAX: usize = 4_096;
/// Longest text of any key but certificates and keys.
const TEXT_BYTES_MAX: usize = 4_096;
/// Longest certificate or key text.
const PEM_BYTES_MAX: usize = 262_144;

/// Type, bounds and unit of a key.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// `IP:PORT/PATH`, numeric.
    Address,
    /// A CPU number, or `last`.
    CpuOrLast,
    /// A list of CPUs: `0-3,5`.
    Cpus,
    /// `namespace/component/endpoint`, in any form.
    Endpoint,
    /// The name of a header in a request frame.
    Header,
    /// A 64-bit number in hexadecimal.
    Hex,
    /// A whole number with both bounds allowed.
    Int {
        /// Least.
        min: i64,
        /// Greatest.
        max: i64,
        /// What is counted.
        unit: &'static str,
    },
    /// An IP address; IPv6 with or without brackets.
    Ip,
    /// A list of plain names: `weights,kv_cache`.
    Names,
    /// A list of numbers: `0-3,5`.
    Numbers {
        /// Greatest.
        max: u32,
        /// What is counted.
        unit: &'static str,
    },
    /// The path of a file or folder.
    Path,
    /// PEM text, or the path of a file with it.
    Pem,
    /// A queue of a network device, `eth0:2`, or `none`.
    NicQueue,
    /// A power of two with both bounds allowed.
    PowerOfTwo {
        /// Least.
        min: i64,
        /// Greatest.
        max: i64,
        /// What is counted.
        unit: &'static str,
    },
    /// Text that is never printed.
    Secret,
    /// Text.
    Text {
        /// Longest, in bytes.
        bytes_max: usize,
    },
    /// A list of server addresses.
    Urls,
    /// One of these words.
    Words(&'static [Word]),
}

/// A value that passed the check of its [`Kind`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Value {
    /// Of `Cpus`: ascending, each once.
    Cpus(Vec<usize>),
    /// Of `Int`, `PowerOfTwo`, and `CpuOrLast` with a number.
    Int(i64),
    /// Of `Names` and `Urls`.
    List(Vec<String>),
    /// Of `Numbers`: ascending, each once.
    Numbers(Vec<u32>),
    /// Of everything else.
    Text(String),
}

impl Value {
    /// For a listing: as it would be typed, without quotes.
    pub fn show(&self) -> String {
        match self {
            Self::Cpus(cpus) => cpu_list(cpus),
            Self::Int(number) => number.to_string(),
            Self::List(items) => items.join(","),
            Self::Numbers(numbers) => {
                cpu_list(&numbers.iter().map(|n| *n as usize).collect::<Vec<_>>())
            }
            Self::Text(text) => text.clone(),
        }
    }
}

/// Why a value was not taken, and what to write instead.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Fault {
    /// What is wrong.
    pub what: String,
    /// What to write.
    pub instead: String,
}

fn fault<T>(what: impl Into<String>, instead: impl Into<String>) -> Result<T, Fault> {
    Err(Fault {
        what: what.into(),
        instead: instead.into(),
    })
}

impl Kind {
    /// Whether the value is written as a number in TOML.
    fn is_number(self) -> bool {
        matches!(self, Self::Int { .. } | Self::PowerOfTwo { .. })
    }

    /// What this type is, for `corelane check --explain`.
    pub fn describe(self) -> String {
        match self {
            Self::Address => "IP:PORT/PATH".into(),
            Self::CpuOrLast => "CPU number or last".into(),
            Self::Cpus => "CPU list such as 0-3,5".into(),
            Self::Endpoint => "namespace/component/endpoint".into(),
            Self::Header => "header name".into(),
            Self::Hex => "hexadecimal number".into(),
            Self::Int { min, max, unit } => format!("{unit}, {min} to {max}"),
            Self::Ip => "IP address".into(),
            Self::Names => "list of names".into(),
            Self::Numbers { max, unit } => format!("list of {unit}, 0 to {max}, such as 0-3,5"),
            Self::NicQueue => "DEVICE:QUEUE or none".into(),
            Self::Path => "path".into(),
            Self::Pem => "PEM text or path".into(),
            Self::PowerOfTwo { min, max, unit } => format!("{unit}, power of two, {min} to {max}"),
            Self::Secret => "secret text".into(),
            Self::Text { .. } => "text".into(),
            Self::Urls => "list of HOST:PORT or URL".into(),
            Self::Words(words) => {
                let usable = words.iter().filter(|word| word.usable);
                usable.map(|word| word.text).collect::<Vec<_>>().join(" | ")
            }
        }
    }

    /// An example of a right value, as it is written in TOML.
    pub(super) fn example(self) -> String {
        match self {
            Self::Address => r#""127.0.0.1:9000/1/dynamo/backend/generate""#.into(),
            Self::CpuOrLast => r#""last" or a CPU number"#.into(),
            Self::Cpus => r#""0-3" or "0-3,5""#.into(),
            Self::Endpoint => r#""dynamo/backend/generate""#.into(),
            Self::Header => r#""x-session-id""#.into(),
            Self::Hex => r#""7d7ba1ff9b377a0c""#.into(),
            Self::Int { min, .. } => min.max(1).to_string(),
            Self::Ip => r#""127.0.0.1""#.into(),
            Self::Names => r#"["weights", "kv_cache"]"#.into(),
            Self::Numbers { .. } => r#""0-3,5""#.into(),
            Self::NicQueue => r#""eth0:2""#.into(),
            Self::Path => r#""/var/lib/corelane""#.into(),
            Self::Pem => r#""/etc/corelane/etcd.pem""#.into(),
            Self::PowerOfTwo { min, max, .. } => max.min(4_096).max(min).to_string(),
            Self::Secret | Self::Text { .. } => r#""text""#.into(),
            Self::Urls => r#"["http://localhost:2379"]"#.into(),
            Self::Words(words) => words.first().map_or_else(String::new, |w| quoted(w.text)),
        }
    }

    /// Reads a value from a TOML document.
    pub fn read_toml(self, key: &Key, value: &DeValue<'_>) -> Result<Value, Fault> {
        if let Some(list) = lists::read_toml(self, key, value) {
            return list;
        }
        match value {
            DeValue::String(text) if self.is_number() => {
                let write = match text.trim().parse::<i64>() {
                    Ok(number) => format!("write {} = {number} without quotes", key.name),
                    Err(_) => format!("write {} = {}", key.name, self.example()),
                };
                fault(
                    format!("{} must be a number, not a string", key.name),
                    write,
                )
            }
            DeValue::String(text) => self.read_text(key, text),
            DeValue::Integer(number) if self.is_number() || self == Self::CpuOrLast => {
                match i64::from_str_radix(number.as_str(), number.radix()) {
                    Ok(number) => self.read_int(key, number),
                    Err(_) => self.read_text(key, number.as_str()),
                }
            }
            DeValue::Integer(number) if self == Self::Cpus => fault(
                format!("{} must be a string, not a number", key.name),
                format!("write {} = \"{}\"", key.name, number.as_str()),
            ),
            DeValue::Boolean(on) if self == Self::Words(Switch::WORDS) => {
                self.read_text(key, if *on { "on" } else { "off" })
            }
            DeValue::Array(items) if self == Self::Urls => {
                let texts: Option<Vec<&str>> =
                    items.iter().map(|item| item.get_ref().as_str()).collect();
                match texts {
                    Some(texts) => urls(key, texts.into_iter()),
                    None => fault(
                        format!("{} must hold strings only", key.name),
                        format!("write {} = {}", key.name, self.example()),
                    ),
                }
            }
            other => fault(
                format!(
                    "{} must be {}, not {}",
                    key.name,
                    self.article(),
                    type_name(other)
                ),
                format!("write {} = {}", key.name, self.example()),
            ),
        }
    }

    fn article(self) -> &'static str {
        match self {
            Self::Int { .. } | Self::PowerOfTwo { .. } => "a whole number",
            Self::CpuOrLast => "a number or \"last\"",
            Self::Urls => "a list of strings",
            _ => "a string",
        }
    }

    /// Reads a value from one line of text, as an environment variable or a flag gives it.
    pub fn read_text(self, key: &Key, text: &str) -> Result<Value, Fault> {
        let bytes_max = match self {
            Self::Pem | Self::Secret => PEM_BYTES_MAX,
            Self::Text { bytes_max } => bytes_max,
            _ => TEXT_BYTES_MAX,
        };
        if text.len() > bytes_max {
            return fault(
                format!("{} is {} bytes long", key.name, text.len()),
                format!("write at most {bytes_max} bytes"),
            );
        }
        if text.trim().is_empty() {
            return fault(
                format!("{} is empty", key.name),
                "write a value or leave it out",
            );
        }
        match self {
            Self::CpuOrLast if text.trim() == "last" => Ok(Value::Text("last".into())),
            kind if kind.is_number() || kind == Self::CpuOrLast => match text.trim().parse() {
                Ok(number) => self.read_int(key, number),
                Err(_) => fault(
                    format!("{} is {}, not a number that fits", key.name, quoted(text)),
                    match self {
                        Self::CpuOrLast => "write \"last\" or a CPU number".to_owned(),
                        _ => format!("write a whole number ({})", self.describe()),
                    },
                ),
            },
            Self::Words(words) => word(key, words, text),
            Self::Cpus => cpus(key, text),
            Self::Names => lists::names(key, text),
            Self::Numbers { max, .. } => lists::numbers(key, max, text),
            Self::Urls => urls(key, text.split(',')),
            _ => self.check_text(key, text).map(Value::Text),
        }
    }

    /// The kinds whose value stays the text that was typed.
    fn check_text(self, key: &Key, text: &str) -> Result<String, Fault> {
        let (right, wrong) = match self {
            Self::Ip => (ip(text).is_some(), "not an IP address"),
            Self::Address => (address(text).is_some(), "not IP:PORT/PATH"),
            Self::Header => (is_header(text), "not a header name"),
            Self::Hex => (is_hex(text), "not a 64-bit hexadecimal number"),
            Self::NicQueue => {
                let right = text == "none" || text.parse::<QueueName>().is_ok();
                (right, "neither DEVICE:QUEUE nor none")
            }
            _ => (!text.contains('\0'), "text with a NUL in it"),
        };
        if right {
            return Ok(text.to_owned());
        }
        let instead = match self {
            Self::Ip if text == "localhost" => "write \"127.0.0.1\"".to_owned(),
            Self::Ip => "write it in numbers; host and interface names are not looked up".into(),
            Self::Header => "write visible characters without blanks and quotes".into(),
            _ => format!("write it like {}", self.example()),
        };
        let shown = if self == Self::Secret {
            "hidden".into()
        } else {
            quoted(text)
        };
        fault(format!("{} is {shown}, {wrong}", key.name), instead)
    }

    fn read_int(self, key: &Key, number: i64) -> Result<Value, Fault> {
        let (min, max, unit) = match self {
            Self::Int { min, max, unit } | Self::PowerOfTwo { min, max, unit } => (min, max, unit),
            _ => (0, CPUS_MAX as i64 - 1, "CPU number"),
        };
        if number < min || number > max {
            return fault(
                format!("{} is {number}, outside {min} to {max} ({unit})", key.name),
                format!("write {}", if number < min { min } else { max }),
            );
        }
        if matches!(self, Self::PowerOfTwo { .. }) && !number.unsigned_abs().is_power_of_two() {
            let above = number.unsigned_abs().next_power_of_two();
            return fault(
                format!("{} is {number}, not a power of two", key.name),
                format!("write {above} or {}", above / 2),
            );
        }
        Ok(Value::Int(number))
    }
}

/// A TOML type with its article.
fn type_name(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

fn word(key: &Key, words: &[Word], text: &str) -> Result<Value, Fault> {
    let usable = || {
        words
            .iter()
            .filter(|word| word.usable)
            .map(|word| word.text)
    };
    let list = usable().map(quoted).collect::<Vec<_>>().join(" | ");
    match words.iter().find(|word| word.text == text) {
        Some(word) if word.usable => Ok(Value::Text(text.to_owned())),
        Some(_) => fault(
            format!("{} = {} is not in this version", key.name, quoted(text)),
            format!("write {list}"),
        ),
        None => fault(
            format!("unknown {} {}", key.name, quoted(text)),
            match nearest(text, usable()) {
                Some(near) => format!("did you mean \"{near}\"? possible are {list}"),
                None => format!("write {list}"),
            },
        ),
    }
}

/// Reads `0-3,5`.
fn cpus(key: &Key, text: &str) -> Result<Value, Fault> {
    let bad = |part: &str| {
        fault(
            format!(
                "{} has {}, which is no CPU number or range",
                key.name,
                quoted(part)
            ),
            r#"write numbers and ranges with commas between, such as "0-3,5""#,
        )
    };
    let mut cpus = Vec::new();
    for part in text.split(',').map(str::trim) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| match text.bytes().all(|byte| byte.is_ascii_digit()) {
            true => text.parse::<usize>().ok(),
            false => None,
        };
        let (Some(first), Some(last)) = (number(first), number(last)) else {
            return bad(part);
        };
        if last >= CPUS_MAX {
            return fault(
                format!("{} names CPU {last}", key.name),
                format!("write numbers up to {}", CPUS_MAX - 1),
            );
        }
        if first > last {
            return fault(
                format!("{} has the range {part}, which runs backwards", key.name),
                format!("write {last}-{first}"),
            );
        }
        if let Some(twice) = (first..=last).find(|cpu| cpus.contains(cpu)) {
            return fault(
                format!("{} names CPU {twice} twice", key.name),
                "write each CPU once",
            );
        }
        cpus.extend(first..=last);
    }
    cpus.sort_unstable();
    Ok(Value::Cpus(cpus))
}

fn urls<'t>(key: &Key, items: impl Iterator<Item = &'t str>) -> Result<Value, Fault> {
    let mut urls = Vec::new();
    for item in items.map(str::trim) {
        let (scheme, rest) = item.split_once("://").unwrap_or(("http", item));
        let host = rest.strip_suffix('/').unwrap_or(rest);
        let right = matches!(scheme, "http" | "https") && is_host_port(host);
        if !right {
            return fault(
                format!(
                    "{} has {}, which is no server address",
                    key.name,
                    quoted(item)
                ),
                r#"write it like "http://localhost:2379""#,
            );
        }
        urls.push(item.to_owned());
    }
    if urls.is_empty() {
        return fault(
            format!("{} is empty", key.name),
            format!("write {} = {}", key.name, Kind::Urls.example()),
        );
    }
    Ok(Value::List(urls))
}

/// `HOST:PORT`, where HOST is a name, an IPv4 address or a bracketed IPv6 address.
fn is_host_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else {
        return false;
    };
    let is_port = port.parse::<u16>().is_ok_and(|port| port > 0);
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    let is_host = match host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
    {
        Some(inner) => inner.parse::<Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.bytes().all(is_name),
    };
    is_port && is_host
}

/// A header name: visible characters that stand in JSON without an escape.
fn is_header(text: &str) -> bool {
    const BYTES_MAX: usize = 128;
    let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'"' && byte != b'\\';
    text.len() <= BYTES_MAX && text.bytes().all(plain)
}

/// A 64-bit number in hexadecimal digits only; the standard library would take a sign too.
fn is_hex(text: &str) -> bool {
    (1..=16).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// An IP address, IPv6 also in brackets.
pub(crate) fn ip(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    match text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
    {
        Some(inner) => inner.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
        None => text.parse().ok(),
    }
}

/// Splits `IP:PORT/PATH`, with or without a leading `tcp://`; the path is kept as it is
/// (`spec/request-plane.md` §2.1). None if it is no address that can be dialled, the path is empty
/// or longer than its 16-bit length field.
pub fn address(text: &str) -> Option<(SocketAddr, &str)> {
    let TcpTransport { address, path } = TcpTransport::parse(text).ok()?;
    let right = address.port() > 0 && !path.is_empty() && path.len() <= usize::from(u16::MAX);
    right.then_some((address, path))
}

#[cfg(test)]
mod tests {
    use super::super::keys;
    use super::*;

    fn read(key: &Key, text: &str) -> Result<Value, String> {
        key.kind
            .read_text(key, text)
            .map_err(|fault| format!("{}; {}", fault.what, fault.instead))
    }

    #[test]
    fn cpu_lists() {
        let cpus = |text| read(&keys::CORE_CPUS, text);
        assert_eq!(cpus("5, 0-2"), Ok(Value::Cpus(vec![0, 1, 2, 5])));
        for bad in [
            "a", "1-", "-1", "1--2", "3-1", "1,1", "0-1,1-2", "99999", "1,,2", "+1",
        ] {
            assert!(cpus(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_keep_to_their_bounds() {
        let port = |text| read(&keys::SERVER_PORT, text);
        assert_eq!(port(" 65535 "), Ok(Value::Int(65_535)));
        let error = "port is 65536, outside 0 to 65535 (port); write 65535";
        assert_eq!(port("65536"), Err(error.into()));
        assert!(port("99999999999999999999").is_err());
        let buffers = read(&keys::CORE_BUFFERS, "5000");
        assert_eq!(
            buffers,
            Err("buffers is 5000, not a power of two; write 8192 or 4096".into())
        );
    }

    #[test]
    fn server_lists() {
        let urls = |text| read(&keys::DISCOVERY_ENDPOINTS, text);
        for good in [
            "a:1",
            "http://etcd-0.etcd:2379/, https://[::1]:2379",
            "10.0.0.1:2379",
        ] {
            assert!(urls(good).is_ok(), "{good}");
        }
        for bad in [
            "a",
            "a:0",
            "ftp://a:1",
            "http://a:1/path",
            "a:1,,b:1",
            "http://:1",
        ] {
            assert!(urls(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_split_at_the_first_slash() {
        let (socket, path) = address("tcp://[::1]:5/a/b").unwrap();
        assert_eq!((socket.to_string().as_str(), path), ("[::1]:5", "a/b"));
        for bad in [
            "127.0.0.1:5",
            "127.0.0.1:5/",
            "host:5/a",
            "127.0.0.1:0/a",
            "127.0.0.1/a",
        ] {
            assert_eq!(address(bad), None, "{bad}");
        }
    }

    #[test]
    fn ip_forms() {
        assert_eq!(ip("[::1]"), ip("::1"));
        assert!(ip("0.0.0.0").is_some());
        assert_eq!(ip("eth0"), None);
        assert_eq!(ip("[127.0.0.1]"), None);
    }
}
