// Package join defines the join string: the one line that an operator carries
// from the server to a new node.
//
// A [String] says where the server is, which roots it has, and holds a join
// token. An agent that is given one needs nothing else: the pinned roots tell
// it that the server it reached is the right one before it sends the token, so
// a join string bootstraps trust in both directions. `hallmark token generate`
// prints it; `hallmark agent run --join` takes it. [String.Encode] writes one,
// [Parse] reads one.
//
// The line is "hallmark-join-v1." and then, in unpadded base64url, the length
// of what follows (two bytes, big endian), trust domain, server address, roots
// and token (each with a length or count of one byte before it; a root is 32
// bytes), and the first eight bytes of the SHA-256 over the prefix and all
// this. Nothing in it needs quoting in a shell or a URL. It is a secret as long
// as its token is unused.
package join

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Prefix begins every join string of this form.
const Prefix = "hallmark-join-v1."

// Bounds of a join string.
const (
	MaxTrustDomain = 255  // bytes; SPIFFE-ID §2.3
	MaxServer      = 255  // bytes of host:port
	MaxRoots       = 8    // a server has two or three while it rotates
	MaxToken       = 255  // bytes
	MaxLength      = 2048 // characters of the whole; what the others allow is less
)

const (
	lengthSize   = 2
	checksumSize = 8
)

// Root is the SHA-256 of an X.509 authority's DER.
type Root [sha256.Size]byte

// String is what a join string carries. Make one by filling a value, or with
// [Parse].
type String struct {
	TrustDomain spiffeid.TrustDomain
	Server      string // host:port to dial
	Roots       []Root // the server's X.509 authorities when the string was made
	Token       string // secret until used
}

// Encode returns the printable form. It fails if a part is missing or beyond
// its bound, or if the server's address is none that another machine can dial.
func (s String) Encode() (string, error) {
	if err := s.validate(); err != nil {
		return "", fmt.Errorf("make join string: %w", err)
	}
	b := make([]byte, lengthSize, 512)
	b = appendText(b, s.TrustDomain.Name())
	b = appendText(b, s.Server)
	b = append(b, byte(len(s.Roots)))
	for _, r := range s.Roots {
		b = append(b, r[:]...)
	}
	b = appendText(b, s.Token)
	binary.BigEndian.PutUint16(b, uint16(len(b)-lengthSize+checksumSize))
	b = append(b, checksum(b)...)
	return Prefix + base64.RawURLEncoding.EncodeToString(b), nil
}

// Errors of [Parse] for a string that was not copied whole. They wrap nothing
// of what was pasted, since that may hold a token.
var (
	ErrIncomplete = errors.New(`join string is incomplete: its end is missing; copy the whole line that "hallmark token generate" printed`)
	ErrDamaged    = errors.New(`join string is damaged: a character of it was changed; copy again the line that "hallmark token generate" printed`)
)

// Parse reads the printable form. White space around it is ignored. No error
// of it holds the token.
func Parse(s string) (*String, error) {
	s = strings.TrimSpace(s)
	switch {
	case s == "":
		return nil, errors.New("join string is empty")
	case len(s) > MaxLength:
		return nil, fmt.Errorf("join string is %d characters long; the most is %d", len(s), MaxLength)
	case len(s) < len(Prefix) && strings.HasPrefix(Prefix, s):
		return nil, ErrIncomplete
	case !strings.HasPrefix(s, Prefix):
		return nil, fmt.Errorf(`not a join string: it does not begin with %q; make one with "hallmark token generate"`, Prefix)
	case strings.ContainsAny(s, " \t\r\n"):
		return nil, errors.New("join string contains white space; it must be one line in one piece")
	}
	b, err := decode(s[len(Prefix):])
	if err != nil {
		return nil, err
	}
	sum := b[len(b)-checksumSize:]
	if b = b[:len(b)-checksumSize]; !bytes.Equal(sum, checksum(b)) {
		return nil, ErrDamaged
	}
	out, err := parseBody(b[lengthSize:])
	if err != nil {
		return nil, fmt.Errorf("join string: %w", err)
	}
	return out, nil
}

// decode undoes base64 and compares the stated length with the real one. What
// it returns is long enough for length and checksum.
func decode(s string) ([]byte, error) {
	whole := s[:len(s)&^3] // what a cut leaves intact
	head, err := base64.RawURLEncoding.DecodeString(whole)
	if err != nil {
		return nil, ErrDamaged
	}
	if len(head) < lengthSize {
		return nil, ErrIncomplete
	}
	want := lengthSize + int(binary.BigEndian.Uint16(head))
	if want < lengthSize+checksumSize {
		return nil, ErrDamaged
	}
	switch n := base64.RawURLEncoding.EncodedLen(want); {
	case len(s) < n:
		return nil, ErrIncomplete
	case len(s) > n:
		return nil, errors.New("join string goes on after its end; copy only the line that \"hallmark token generate\" printed")
	}
	// Strict: the unused bits of the last character are zero, so that one
	// value has one form.
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil {
		return nil, ErrDamaged
	}
	return b, nil
}

// parseBody reads the parts between length and checksum.
func parseBody(b []byte) (*String, error) {
	var out String
	name, b, err := cutText(b)
	if err != nil {
		return nil, err
	}
	if out.Server, b, err = cutText(b); err != nil {
		return nil, err
	}
	if len(b) == 0 {
		return nil, errShort
	}
	n := int(b[0])
	b = b[1:]
	if n > MaxRoots {
		return nil, fmt.Errorf("it has %d roots; the most is %d", n, MaxRoots)
	}
	if len(b) < n*len(Root{}) {
		return nil, errShort
	}
	for range n {
		out.Roots = append(out.Roots, Root(b))
		b = b[len(Root{}):]
	}
	if out.Token, b, err = cutText(b); err != nil {
		return nil, err
	}
	if len(b) != 0 {
		return nil, fmt.Errorf("%d bytes are left over", len(b))
	}
	if out.TrustDomain, err = spiffeid.TrustDomainFromString(name); err != nil || out.TrustDomain.Name() != name {
		return nil, fmt.Errorf("trust domain %q is malformed", name)
	}
	if err := out.validate(); err != nil {
		return nil, err
	}
	return &out, nil
}

func (s *String) validate() error {
	if s.TrustDomain.IsZero() {
		return errors.New("missing trust domain")
	}
	if n := len(s.TrustDomain.Name()); n > MaxTrustDomain {
		return fmt.Errorf("trust domain is %d bytes long; the most is %d", n, MaxTrustDomain)
	}
	if err := validateServer(s.Server); err != nil {
		return err
	}
	if n := len(s.Roots); n < 1 || n > MaxRoots {
		return fmt.Errorf("it has %d roots; 1 to %d are allowed", n, MaxRoots)
	}
	for i, r := range s.Roots {
		if slices.Contains(s.Roots[:i], r) {
			return errors.New("a root is named twice")
		}
	}
	if n := len(s.Token); n < 1 || n > MaxToken {
		return fmt.Errorf("token is %d bytes long; 1 to %d are allowed", n, MaxToken)
	}
	// The token becomes a segment of the agent's SPIFFE ID.
	if spiffeid.ValidatePathSegment(s.Token) != nil {
		return errors.New("token contains other characters than letters, digits, '-', '_' and '.'")
	}
	return nil
}

func validateServer(server string) error {
	if len(server) > MaxServer {
		return fmt.Errorf("server address is %d bytes long; the most is %d", len(server), MaxServer)
	}
	host, port, err := net.SplitHostPort(server)
	if err != nil {
		return fmt.Errorf("server address %q is not host:port", server)
	}
	if p, err := strconv.ParseUint(port, 10, 16); err != nil || p == 0 {
		return fmt.Errorf("server address %q has no port between 1 and 65535", server)
	}
	for _, r := range host {
		if r <= ' ' || r >= 0x7f {
			return fmt.Errorf("server address %q contains %q", server, r)
		}
	}
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		return fmt.Errorf(`server address %q is none that an agent can dial; set "advertise" in the server's configuration`, server)
	}
	return nil
}

// Pins reports whether the certificate is one of the roots.
func (s *String) Pins(cert *x509.Certificate) bool {
	return slices.Contains(s.Roots, Root(sha256.Sum256(cert.Raw)))
}

// String says what it is for, without the token.
func (s String) String() string {
	return fmt.Sprintf("join string for %s at %s with %d pinned roots and a token", s.TrustDomain.Name(), s.Server, len(s.Roots))
}

// GoString is [String.String], so that %#v does not show the token either.
func (s String) GoString() string { return s.String() }

// LogValue is for log/slog; it leaves out the token.
func (s String) LogValue() slog.Value {
	return slog.GroupValue(
		slog.String("trust_domain", s.TrustDomain.Name()),
		slog.String("server", s.Server),
		slog.Int("roots", len(s.Roots)),
	)
}

func checksum(b []byte) []byte {
	h := sha256.New()
	h.Write([]byte(Prefix))
	h.Write(b)
	return h.Sum(nil)[:checksumSize]
}

var errShort = errors.New("a part runs beyond the end")

func appendText(b []byte, s string) []byte {
	return append(append(b, byte(len(s))), s...)
}

func cutText(b []byte) (string, []byte, error) {
	if len(b) == 0 || len(b)-1 < int(b[0]) {
		return "", nil, errShort
	}
	n := 1 + int(b[0])
	return string(b[1:n]), b[n:], nil
}
