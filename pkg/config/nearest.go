package config

import (
	"fmt"
	"slices"
	"strings"
)

// unknownKey says that a key is unknown, and which was probably meant.
func unknownKey(key string, valid []string) string {
	if near := Nearest(key, valid); near != "" {
		return fmt.Sprintf("unknown key `%s`, did you mean `%s`?", shorten(key), near)
	}
	if len(valid) == 0 {
		return fmt.Sprintf("unknown key `%s`; there are no keys here", shorten(key))
	}
	valid = slices.Sorted(slices.Values(valid))
	return fmt.Sprintf("unknown key `%s`; the keys here are %s", shorten(key), strings.Join(valid, ", "))
}

// choose says which values there are, and which was probably meant.
func choose(text string, valid []string) string {
	if near := Nearest(text, valid); near != "" {
		return fmt.Sprintf("did you mean %q?", near)
	}
	return "it is one of " + strings.Join(valid, ", ")
}

func shorten(s string) string {
	const longest = 60 // characters
	if r := []rune(s); len(r) > longest {
		return string(r[:longest]) + "…"
	}
	return s
}

// Nearest returns the word of valid that a mistyped one was probably meant to
// be, or the empty string if none is near. Case, dashes and underscores do not
// count.
func Nearest(word string, valid []string) string {
	const longest = 64 // bytes; longer words are no typing mistakes
	w := plain(word)
	if w == "" || len(w) > longest {
		return ""
	}
	best, least := "", max(1, len(w)/3)+1
	for _, v := range valid {
		p := plain(v)
		if len(p) > longest {
			continue
		}
		d := distance(w, p)
		if len(w) >= 3 && len(p) >= 3 && (strings.HasPrefix(w, p) || strings.HasPrefix(p, w)) {
			d = min(d, 1) // addr for address
		}
		if len(w) >= 5 && len(p) >= 5 && (strings.HasSuffix(w, p) || strings.HasSuffix(p, w)) {
			d = min(d, 1) // lifetime for svid_lifetime
		}
		if d < least {
			best, least = v, d
		}
	}
	return best
}

func plain(s string) string {
	return strings.NewReplacer("_", "", "-", "").Replace(strings.ToLower(s))
}

// distance counts the bytes to insert, delete, replace or swap with their
// neighbour, to turn a into b.
func distance(a, b string) int {
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(row[j-1]+1, last[j]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last, row = last, row, before
	}
	return last[len(b)]
}
