// Package selector defines the selector, one attested property of a node or a
// workload, and sets of them.
//
// A [Selector] is written type:value, for example unix:uid:1000 or
// k8s:ns:shop: its type is the attestor that found it, its value is whatever
// follows the first colon. An attestation yields a [Set]; a registration entry
// names a set; the entry matches when its set is a subset of the attested one.
package selector

import (
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
)

// Bounds of what outsiders may name in a selector, in bytes.
const (
	MaxType  = 255
	MaxValue = 4096
)

// Selector is one attested property. The zero value is no selector.
type Selector struct {
	Type  string // the attestor that found it; not empty, no colon
	Value string // not empty
}

// New makes a selector of a type and a value. It fails if the type is empty,
// holds a colon or is longer than [MaxType], or if the value is empty or longer
// than [MaxValue].
func New(typ, value string) (Selector, error) {
	switch {
	case typ == "":
		return Selector{}, errors.New("selector has no type; write it type:value, for example unix:uid:1000")
	case strings.Contains(typ, ":"):
		return Selector{}, fmt.Errorf("selector type %q contains a colon", typ)
	case len(typ) > MaxType:
		return Selector{}, fmt.Errorf("selector type is %d bytes long; the most is %d", len(typ), MaxType)
	case value == "":
		return Selector{}, fmt.Errorf("selector of type %q has no value; write it type:value, for example unix:uid:1000", typ)
	case len(value) > MaxValue:
		return Selector{}, fmt.Errorf("selector value of type %q is %d bytes long; the most is %d", typ, len(value), MaxValue)
	}
	return Selector{Type: typ, Value: value}, nil
}

// Parse reads the form type:value.
func Parse(s string) (Selector, error) {
	typ, value, ok := strings.Cut(s, ":")
	if !ok {
		return Selector{}, fmt.Errorf("selector %q has no colon; write it type:value, for example unix:uid:1000", s)
	}
	return New(typ, value)
}

// String returns the form type:value.
func (s Selector) String() string { return s.Type + ":" + s.Value }

// Compare orders selectors by type, then value.
func (s Selector) Compare(t Selector) int {
	if c := strings.Compare(s.Type, t.Type); c != 0 {
		return c
	}
	return strings.Compare(s.Value, t.Value)
}

// Set is a set of selectors: sorted by [Selector.Compare], without duplicates.
// Make one with [NewSet]; do not change it afterwards.
type Set []Selector

// NewSet makes a set of selectors in any order. It sorts the slice in place.
func NewSet(selectors ...Selector) Set {
	slices.SortFunc(selectors, Selector.Compare)
	return slices.Compact(selectors)
}

// Contains reports whether s holds x.
func (s Set) Contains(x Selector) bool {
	_, ok := slices.BinarySearchFunc(s, x, Selector.Compare)
	return ok
}

// SubsetOf reports whether every selector of s is in t. The empty set is a
// subset of every set.
func (s Set) SubsetOf(t Set) bool {
	for range s.Missing(t) {
		return false
	}
	return true
}

// Missing yields the selectors of s that t lacks.
func (s Set) Missing(t Set) iter.Seq[Selector] {
	return func(yield func(Selector) bool) {
		i := 0
		for _, x := range s {
			for i < len(t) && t[i].Compare(x) < 0 {
				i++
			}
			if i < len(t) && t[i] == x {
				continue
			}
			if !yield(x) {
				return
			}
		}
	}
}

// Equal reports whether s and t hold the same selectors.
func (s Set) Equal(t Set) bool { return slices.Equal(s, t) }

// Strings returns the selectors in the form type:value.
func (s Set) Strings() []string {
	out := make([]string, len(s))
	for i, x := range s {
		out[i] = x.String()
	}
	return out
}
