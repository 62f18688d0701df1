// Package statuslist tells whether a token that has not ended was revoked, by
// the Token Status List (draft-ietf-oauth-status-list, "TSL" below): an array of
// a few bits a token, which its issuer signs and serves. A token says in its
// claim status which list and which index are its own.
//
// Whoever validates tokens makes one [Checker] and asks it after each token that
// is valid by itself:
//
//	svid, err := jwtsvid.Validate(token, audience, bundles, time.Now())
//	…
//	err = checker.Check(ctx, svid.ID.TrustDomain(), svid.Claims)
//
// [List] is the array, [Verify] reads a signed one.
package statuslist

import (
	"bytes"
	"compress/zlib"
	"errors"
	"fmt"
	"io"
)

// MaxSize is how many bytes of statuses a list may have: 8 million tokens of
// one bit. Larger ones are not read, however small they are compressed.
const MaxSize = 1 << 20

// Status is that of a token. TSL §7.1; all others are application specific or
// not assigned, and not valid.
type Status uint8

// The statuses that have a meaning everywhere.
const (
	Valid     Status = 0
	Invalid   Status = 1 // for ever
	Suspended Status = 2 // until it is valid again
)

func (s Status) String() string {
	switch s {
	case Valid:
		return "valid"
	case Invalid:
		return "revoked"
	case Suspended:
		return "suspended"
	}
	return fmt.Sprintf("of status %d, which is unknown", uint8(s))
}

// List is the statuses of a number of tokens, by index from 0. TSL §4.1.
type List struct {
	bits int
	data []byte
}

// New makes a list in which all are valid, of so many tokens, rounded up to a
// whole byte, with 1, 2, 4 or 8 bits for each. It fails if it would be larger
// than [MaxSize].
func New(bits, tokens int) (*List, error) {
	if err := checkBits(bits); err != nil {
		return nil, err
	}
	per := 8 / bits
	if tokens <= 0 || tokens > MaxSize*per {
		return nil, fmt.Errorf("a status list of %d tokens; it has at least one and at most %d", tokens, MaxSize*per)
	}
	return &List{bits, make([]byte, (tokens+per-1)/per)}, nil
}

func checkBits(bits int) error {
	switch bits {
	case 1, 2, 4, 8:
		return nil
	}
	return fmt.Errorf("a status list of %d bits a token; there are 1, 2, 4 or 8", bits)
}

// Decompress reads a list as it is sent, without the base64url.
func Decompress(bits int, compressed []byte) (*List, error) {
	if err := checkBits(bits); err != nil {
		return nil, err
	}
	source := bytes.NewReader(compressed)
	z, err := zlib.NewReader(source)
	if err != nil {
		return nil, fmt.Errorf("status list: %w", err)
	}
	data, err := io.ReadAll(io.LimitReader(z, MaxSize+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("status list: %w", err)
	case len(data) > MaxSize:
		return nil, fmt.Errorf("the status list has more than %d bytes", MaxSize)
	case len(data) == 0:
		return nil, errors.New("the status list is empty")
	case source.Len() > 0:
		return nil, errors.New("status list: more follows its end")
	}
	return &List{bits, data}, nil
}

// Compress returns the list as it is sent: zlib, RFC 1950.
func (l *List) Compress() []byte {
	var b bytes.Buffer
	z, err := zlib.NewWriterLevel(&b, zlib.BestCompression)
	if err == nil {
		if _, err = z.Write(l.data); err == nil {
			err = z.Close()
		}
	}
	if err != nil {
		panic(err) // writing to memory does not fail, and the level is one
	}
	return b.Bytes()
}

// Bits returns how many bits a status has.
func (l *List) Bits() int { return l.bits }

// Len returns how many tokens the list is of.
func (l *List) Len() int { return len(l.data) * 8 / l.bits }

// at returns where a status is: bits count from the least significant. TSL §4.1.
func (l *List) at(i int) (index, shift int, mask byte) {
	per := 8 / l.bits
	return i / per, i % per * l.bits, byte(1<<l.bits - 1)
}

// Status returns the status of an index, and whether the list has it.
func (l *List) Status(i int) (Status, bool) {
	if i < 0 || i >= l.Len() {
		return 0, false
	}
	index, shift, mask := l.at(i)
	return Status(l.data[index] >> shift & mask), true
}

// Set sets the status of an index of the list, which must fit into its bits.
func (l *List) Set(i int, s Status) {
	index, shift, mask := l.at(i)
	if byte(s)&^mask != 0 {
		panic(fmt.Sprintf("status %d does not fit into %d bits", s, l.bits))
	}
	l.data[index] = l.data[index]&^(mask<<shift) | byte(s)<<shift
}

// Clone returns a list of its own with the same statuses.
func (l *List) Clone() *List { return &List{l.bits, bytes.Clone(l.data)} }

// Count returns how many tokens are not valid.
func (l *List) Count() (n int) {
	for i := range l.Len() {
		if s, _ := l.Status(i); s != Valid {
			n++
		}
	}
	return n
}
