//! Reads the golden bytes of `codec/golden/1.6.1`.

#![allow(dead_code, reason = "each test binary uses its own part of this")]

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// One row of the index, with its bytes.
pub(crate) struct Vector {
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) row: Value,
}

impl Vector {
    /// What Dynamo did with the bytes.
    pub(crate) fn expect(&self) -> &Value {
        &self.row["expect"]
    }

    pub(crate) fn fields(&self) -> &Value {
        &self.row["fields"]
    }
}

pub(crate) fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/1.6.1")
}

/// All vectors of the index; panics if one is missing or has another length than it should.
pub(crate) fn vectors() -> Vec<Vector> {
    let folder = golden().join("request_plane");
    let index = fs::read(folder.join("vectors.json")).expect("the index");
    let index: Value = serde_json::from_slice(&index).expect("the index is JSON");
    let rows = index["vectors"].as_array().expect("rows");
    assert_eq!(index["count"].as_u64(), Some(rows.len() as u64));
    let vectors: Vec<Vector> = rows.iter().map(|row| load(&folder, row)).collect();
    assert!(vectors.len() > 150, "the index has lost rows");
    vectors
}

fn load(folder: &Path, row: &Value) -> Vector {
    let text = |key: &str| row[key].as_str().expect(key).to_owned();
    let name = text("name");
    let hex = fs::read_to_string(folder.join(text("file"))).expect(&name);
    let bytes = unhex(hex.trim());
    assert_eq!(Some(bytes.len() as u64), row["len"].as_u64(), "{name}");
    Vector {
        name,
        kind: text("kind"),
        bytes,
        row: row.clone(),
    }
}

pub(crate) fn unhex(hex: &str) -> Vec<u8> {
    assert!(hex.len().is_multiple_of(2));
    (0..hex.len() / 2)
        .map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).expect("hex"))
        .collect()
}

/// The bytes that the index describes by a formula, or as hex, or as text.
pub(crate) fn described(value: &Value, bytes: usize) -> Vec<u8> {
    let text = value
        .as_str()
        .unwrap_or_else(|| value["hex"].as_str().expect("text or hex"));
    if text == "byte i = (31*i+7) mod 256" {
        return (0..bytes).map(|at| (31 * at + 7) as u8).collect();
    }
    if text.len() == bytes {
        return text.as_bytes().to_vec();
    }
    unhex(text)
}
