// Package attestors defines what an attestor is: one kind of evidence about a
// node or a workload, and the halves that make and check it.
//
// Each kind has a package of its own below this one, with whichever halves
// exist for it: [Agent] collects the proof on a node, [Server] verifies it,
// [Workload] turns a process into selectors. Attestors know nothing of how
// server or agent work inside; what they need is given to their constructors.
package attestors

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/hallmark-id/hallmark/pkg/selector"
)

// Agent is the half that proves what a node is.
type Agent interface {
	// Proof returns the attestation's payload. It is called once for each
	// attempt.
	Proof(ctx context.Context) ([]byte, error)
	// Respond answers a challenge of the server.
	Respond(ctx context.Context, challenge []byte) ([]byte, error)
}

// ErrUnavailable is what [Server.Verify] returns, wrapped or not, when a proof
// cannot be checked for a reason that is not the node's. The node tries again;
// the attestor has logged the reason.
var ErrUnavailable = errors.New("proof of what the node is cannot be checked now; try again")

// Server is the half that verifies a node's proof.
type Server interface {
	// Verify checks a payload of at most 64 KiB. It may send challenges, at
	// most ten, through the function it is given, which returns the node's
	// response. An error's text is told to the node, except beside
	// [ErrUnavailable]: it says what is wrong with the proof and nothing of what
	// else exists.
	Verify(ctx context.Context, payload []byte, challenge func(context.Context, []byte) ([]byte, error)) (*Evidence, error)
}

// Evidence is what a verified proof says of a node.
type Evidence struct {
	// Path is the part of the agent's SPIFFE ID after /spire/agent/, for
	// example join_token/<token>. It begins with the attestor's name.
	Path string
	// Selectors of the node; their type is the attestor's name.
	Selectors []selector.Selector
	// CanReattest says that the same proof may be given again. An agent that
	// cannot must renew its SVID before it ends.
	CanReattest bool
	// Once says that the proof may be in others' hands, too: it admits the node
	// only if there is no agent of its ID yet. An operator who evicts that one
	// lets the node attest anew.
	Once bool
}

// Process is a workload as the kernel vouches for it, pinned: the process that
// connected, not one that got its PID later.
type Process struct {
	PID int32  // in the agent's PID namespace
	UID uint32 // effective, when it connected
	GID uint32 // effective, when it connected
}

// Workload is the half that attests a process.
type Workload interface {
	// Attest returns the selectors of a process; their type is the attestor's
	// name. A process that is not of this attestor's kind (one outside of any
	// container, say) has none, without an error. Selectors that come with an error
	// are certain; it says why there are not more. The caller checks afterwards
	// that the process is still the one it pinned.
	Attest(ctx context.Context, process Process) ([]selector.Selector, error)
}

// Clip bounds a text that a node sent, for an error.
func Clip(text string) string {
	const longest = 100 // bytes
	if len(text) <= longest {
		return text
	}
	return strings.ToValidUTF8(text[:longest], "") + "…"
}

// SelectorsOf makes selectors of an attestor's name out of what a verified proof
// says of a node. A value that would not be readable text, or is longer than any
// that can be registered, has none.
func SelectorsOf(name string, values []string) []selector.Selector {
	var out []selector.Selector
	for _, value := range values {
		if !utf8.ValidString(value) || strings.ContainsFunc(value, unicode.IsControl) {
			continue
		}
		if s, err := selector.New(name, value); err == nil {
			out = append(out, s)
		}
	}
	return selector.NewSet(out...)
}

// VerifyChain returns every chain from the first of some certificates, which a
// node sent, over the others to an authority that is trusted now. The error's text
// may be told to the node: it names no authority that the node did not send.
func VerifyChain(certs []*x509.Certificate, roots *x509.CertPool, now time.Time) ([][]*x509.Certificate, error) {
	leaf, intermediates := certs[0], x509.NewCertPool()
	for _, cert := range certs[1:] {
		intermediates.AddCert(cert)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots:         roots,
		Intermediates: intermediates,
		CurrentTime:   now,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageAny}, // it was made for other ends
	})
	if unknown := (x509.UnknownAuthorityError{}); errors.As(err, &unknown) {
		return nil, fmt.Errorf("certificate of %q, issued by %q, does not lead to an authority that this server trusts for this attestor",
			Clip(leaf.Subject.String()), Clip(leaf.Issuer.String()))
	}
	if err != nil {
		return nil, fmt.Errorf("certificate of %q does not verify: %w", Clip(leaf.Subject.String()), err)
	}
	return chains, nil
}
