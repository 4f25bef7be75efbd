//! Closed sets of words: enums whose variants are each written as one.

/// A word that a setting may be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Word {
    /// As it is written.
    pub text: &'static str,
    /// False for a word of the contract that this version refuses.
    pub usable: bool,
}

/// Declares an enum and the word that each of its variants is written as, in settings, on a wire
/// and in labels; and words that are known and refused.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident {
        $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)+
        $(; refused $($refused:literal),+)?
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, serde::Deserialize)]
        pub enum $name {
            $($(#[$variant_doc])* #[serde(rename = $text)] $variant,)+
        }

        impl $name {
            /// Every variant, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// Every word, the refused ones included.
            pub const WORDS: &'static [$crate::words::Word] = &[
                $($crate::words::Word { text: $text, usable: true },)+
                $($($crate::words::Word { text: $refused, usable: false },)+)?
            ];

            /// The word as it is written.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }

            /// Reads a word; none for a refused or unknown one.
            pub fn parse(text: &str) -> Option<Self> {
                match text {
                    $($text => Some(Self::$variant),)+
                    _ => None,
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

pub(crate) use words;
