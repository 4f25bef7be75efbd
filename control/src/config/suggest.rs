//! The nearest known word to one that was mistyped.

/// The candidate that is nearest to `word`, if any is near enough to be what was meant.
///
/// Near enough is a third of the word's length, at least 1, at most 3 edits.
pub(crate) fn nearest<'c>(
    word: &str,
    candidates: impl IntoIterator<Item = &'c str>,
) -> Option<&'c str> {
    const CHARS_MAX: usize = 64;
    let chars = word.chars().count();
    if chars > CHARS_MAX {
        return None;
    }
    let edits_max = (chars / 3).clamp(1, 3);
    candidates
        .into_iter()
        .map(|candidate| (edits(word, candidate), candidate))
        .filter(|(edits, _)| *edits <= edits_max)
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, candidate)| candidate)
}

/// Edit distance with swapped neighbours as one edit, letter case ignored.
fn edits(left: &str, right: &str) -> usize {
    let left: Vec<char> = left.to_lowercase().chars().collect();
    let right: Vec<char> = right.to_lowercase().chars().collect();
    // Three rows of the usual table are enough: a swap looks two rows back.
    let mut before: Vec<usize> = vec![0; right.len() + 1];
    let mut above: Vec<usize> = (0..=right.len()).collect();
    for (i, &l) in left.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, &r) in right.iter().enumerate() {
            let mut least = (above[j] + usize::from(l != r))
                .min(above[j + 1] + 1)
                .min(row[j] + 1);
            if i > 0 && j > 0 && l == right[j - 1] && left[i - 1] == r {
                least = least.min(before[j - 1] + 1);
            }
            row.push(least);
        }
        before = std::mem::replace(&mut above, row);
    }
    above[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        assert_eq!(edits("", "abc"), 3);
        assert_eq!(edits("polcy", "policy"), 1);
        assert_eq!(edits("hots", "host"), 1, "a swap is one edit");
        assert_eq!(edits("PORT", "port"), 0);
        assert_eq!(edits("kitten", "sitting"), 3);
    }

    #[test]
    fn only_near_words_are_suggested() {
        let words = ["policy", "port", "host"];
        assert_eq!(nearest("polcy", words), Some("policy"));
        assert_eq!(nearest("prot", words), Some("port"));
        assert_eq!(nearest("zebra", words), None);
        assert_eq!(nearest(&"p".repeat(10_000), words), None);
    }
}
