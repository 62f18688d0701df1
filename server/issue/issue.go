// Package issue is the one way in which a server issues a credential.
//
// Every one (workloads' X509-, JWT- and WIT-SVIDs, nodes' SVIDs, minted ones,
// CA certificates for downstream servers, the server's own) goes the same way
// through an [Issuer]: the caller has decided that the one who asks is
// authorized; the credential is built from the registration entry and the
// configuration, signed with the active authority, and recorded. From a
// certificate signing request only the public key is taken, after its
// signature was verified; [Issuer.MintX509], which administrators call, is the
// exception that says so.
//
// An error that is the request's fault is an [InvalidError]. When there is no
// authority to sign with it is [authority.ErrUnavailable].
package issue

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/statuslist"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/journal"
	"github.com/hallmark-id/hallmark/server/metrics"
	"github.com/hallmark-id/hallmark/server/tokenstatus"
)

// Lifetimes of SVIDs, unless configured otherwise.
const (
	DefaultX509TTL  = time.Hour
	DefaultWITTTL   = time.Hour       // it is of no use without its key
	DefaultJWTTTL   = 5 * time.Minute // a bearer token: JWT-SVID §7.1
	DefaultAgentTTL = time.Hour
)

// Authorities are the keys that sign. One call is made for each credential; it
// returns the same pointer as long as the same authority is active.
type Authorities interface {
	X509() (*authority.X509, error)
	JWT() (*authority.JWT, error)
	WIT() (*authority.JWT, error)
	JWTRS256() (*authority.JWT, error) // for profiles that need it
}

// Options are what an [Issuer] is made of.
type Options struct {
	TrustDomain spiffeid.TrustDomain
	Authorities Authorities
	Now         func() time.Time // nil: time.Now
	Log         *slog.Logger     // one line a credential, level info; nil: none
	Metrics     *metrics.Metrics // nil: none

	X509TTL   time.Duration // of workloads' X509-SVIDs; 0: DefaultX509TTL
	JWTTTL    time.Duration // of JWT-SVIDs; 0: DefaultJWTTTL
	WITTTL    time.Duration // of WIT-SVIDs; 0: DefaultWITTTL
	AgentTTL  time.Duration // of nodes' X509-SVIDs; 0: DefaultAgentTTL
	JWTIssuer string        // claim iss of JWT-SVIDs; empty: none
	Profiles  []*Profile    // of JWT-SVIDs for some audiences; the first that fits

	// Journal keeps what was issued, so that it can be revoked. Nil: nothing does.
	Journal *journal.Journal
	// CRLURL, if set, is the start of the URL at which CRLs are served; the ID of
	// the authority and ".crl" follow it in each certificate.
	CRLURL string
	// Status gives each JWT-SVID and WIT-SVID a place in a status list, by which it
	// can be revoked; the journal keeps them then. Nil: they have none.
	Status *tokenstatus.Lists
}

// Issuer issues credentials. It is safe for concurrent use.
type Issuer struct {
	td          spiffeid.TrustDomain
	authorities Authorities
	now         func() time.Time
	log         *slog.Logger
	metrics     *metrics.Metrics
	x509TTL     time.Duration
	jwtTTL      time.Duration
	witTTL      time.Duration
	agentTTL    time.Duration
	jwtIssuer   string
	profiles    []*Profile
	journal     *journal.Journal
	crlURL      string
	status      *tokenstatus.Lists

	// What stays the same as long as an authority does.
	x509     atomic.Pointer[x509Signer]
	jwt, wit jwtKind
	jwtRS256 jwtKind
	list     jwtKind // status lists, which JWT authorities sign

	signed sync.Map // *tally, by authority ID: one for each that has signed

	serverMu sync.Mutex
	server   atomic.Pointer[serverSVID]
}

// New makes an issuer.
func New(o Options) *Issuer {
	i := &Issuer{
		td:          o.TrustDomain,
		authorities: o.Authorities,
		now:         o.Now,
		log:         o.Log,
		metrics:     o.Metrics,
		x509TTL:     cmp.Or(o.X509TTL, DefaultX509TTL),
		jwtTTL:      cmp.Or(o.JWTTTL, DefaultJWTTTL),
		witTTL:      cmp.Or(o.WITTTL, DefaultWITTTL),
		agentTTL:    cmp.Or(o.AgentTTL, DefaultAgentTTL),
		jwtIssuer:   o.JWTIssuer,
		profiles:    o.Profiles,
		journal:     o.Journal,
		crlURL:      o.CRLURL,
		status:      o.Status,
		jwt:         jwtKind{kind: "jwt", span: "sign JWT", typ: "JWT", authority: o.Authorities.JWT},
		jwtRS256:    jwtKind{kind: "jwt", span: "sign JWT", typ: "JWT", authority: o.Authorities.JWTRS256},
		list:        jwtKind{kind: "status list", typ: statuslist.Type, authority: o.Authorities.JWT},
		wit:         jwtKind{kind: "wit", span: "sign WIT", typ: "wit+jwt", authority: o.Authorities.WIT},
	}
	if i.now == nil {
		i.now = time.Now
	}
	if i.log == nil {
		i.log = slog.New(slog.DiscardHandler)
	}
	if i.metrics == nil {
		i.metrics = metrics.New(nil)
	}
	return i
}

// DefaultTTLs returns the lifetimes of SVIDs whose entry names none.
func (i *Issuer) DefaultTTLs() (x509TTL, jwtTTL time.Duration) { return i.x509TTL, i.jwtTTL }

// InvalidError says what is wrong with a request, to the one who made it.
type InvalidError struct {
	Reason string
}

func (e *InvalidError) Error() string { return e.Reason }

func invalid(format string, args ...any) error {
	return &InvalidError{Reason: fmt.Sprintf(format, args...)}
}

// X509SVID is an issued certificate: an X509-SVID, or a CA certificate for a
// downstream server.
type X509SVID struct {
	ID           spiffeid.ID
	Chain        [][]byte // DER, leaf first, without the root
	SerialNumber string   // decimal
	ExpiresAt    time.Time
	AuthorityID  string // of the authority that signed it
	Hint         string // of the entry
}

// JWTSVID is an issued JWT: a JWT-SVID or a WIT-SVID.
type JWTSVID struct {
	ID        spiffeid.ID
	Token     string
	IssuedAt  time.Time
	ExpiresAt time.Time
	Hint      string // of the entry
}

type throughKey struct{}

// Through returns a context of what is issued through an agent: the journal
// keeps which, so that all of it can be revoked with the agent.
func Through(ctx context.Context, node spiffeid.ID) context.Context {
	return context.WithValue(ctx, throughKey{}, node)
}

// keep keeps a certificate or a token that is about to go out.
func (i *Issuer) keep(ctx context.Context, id spiffeid.ID, authorityID string, serial []byte, issued, expires time.Time) {
	if i.journal == nil {
		return
	}
	v := journal.SVID{ID: id.String(), Authority: authorityID, IssuedAt: issued.Unix(), ExpiresAt: expires.Unix()}
	if node, ok := ctx.Value(throughKey{}).(spiffeid.ID); ok {
		v.Node = node.String()
	}
	copy(v.Serial[len(v.Serial)-len(serial):], serial)
	i.journal.Add(v)
}

// WorkloadX509 issues the X509-SVID of an entry for the public key of a
// certificate signing request.
func (i *Issuer) WorkloadX509(ctx context.Context, e *entry.Entry, csr []byte) (*X509SVID, error) {
	key, err := publicKey(csr)
	if err != nil {
		return nil, err
	}
	svid, err := i.signX509(ctx, certificate{
		reason:   "workload",
		entry:    e.ID,
		id:       e.SPIFFEID,
		dnsNames: e.DNSNames,
		key:      key,
		ttl:      cmp.Or(e.X509SVIDTTL, i.x509TTL),
	})
	if err != nil {
		return nil, err
	}
	svid.Hint = e.Hint
	return svid, nil
}

// NodeX509 issues the X509-SVID of a node for the public key of a certificate
// signing request.
func (i *Issuer) NodeX509(ctx context.Context, id spiffeid.ID, csr []byte) (*X509SVID, error) {
	if !id.MemberOf(i.td) || !strings.HasPrefix(id.Path(), agentPath) {
		return nil, invalid("%q is not the ID of an agent in trust domain %q", id, i.td.Name())
	}
	key, err := publicKey(csr)
	if err != nil {
		return nil, err
	}
	return i.signX509(Through(ctx, id), certificate{reason: "node", id: id, key: key, ttl: i.agentTTL})
}

// DownstreamCA issues the CA certificate of a downstream server, which has the
// ID of the trust domain, for the public key of a certificate signing request.
// Zero as its lifetime stands for as long as the authority above it lives.
func (i *Issuer) DownstreamCA(ctx context.Context, csr []byte, ttl time.Duration) (*X509SVID, error) {
	if err := validateTTL(ttl); err != nil {
		return nil, err
	}
	key, err := publicKey(csr)
	if err != nil {
		return nil, err
	}
	return i.signX509(ctx, certificate{
		reason: "downstream",
		id:     i.td.ID(),
		key:    key,
		ttl:    cmp.Or(ttl, authority.MaxLifetime),
		ca:     true,
	})
}

// WorkloadJWT issues a JWT-SVID of an entry for an audience of at least one.
func (i *Issuer) WorkloadJWT(ctx context.Context, e *entry.Entry, audience []string) (*JWTSVID, error) {
	svid, err := i.signJWT(ctx, token{
		reason:   "workload",
		entry:    e.ID,
		id:       e.SPIFFEID,
		audience: audience,
		ttl:      cmp.Or(e.JWTSVIDTTL, i.jwtTTL),
		jti:      e.JWTIncludeJTI,
	})
	if err != nil {
		return nil, err
	}
	svid.Hint = e.Hint
	return svid, nil
}

// MintJWT issues a JWT-SVID of any workload's ID in the trust domain, for
// administrators. Zero as its lifetime stands for the default.
func (i *Issuer) MintJWT(ctx context.Context, id spiffeid.ID, audience []string, ttl time.Duration) (*JWTSVID, error) {
	if err := i.validateWorkloadID(id); err != nil {
		return nil, err
	}
	if err := validateTTL(ttl); err != nil {
		return nil, err
	}
	return i.signJWT(ctx, token{reason: "mint", id: id, audience: audience, ttl: cmp.Or(ttl, i.jwtTTL)})
}

const (
	reservedPath = "/spire"        // servers and agents have their IDs below it
	agentPath    = "/spire/agent/" // before the path that an attestor chose
)

// validateWorkloadID checks an ID that an administrator named.
func (i *Issuer) validateWorkloadID(id spiffeid.ID) error {
	switch {
	case id.IsZero():
		return invalid("missing SPIFFE ID")
	case !id.MemberOf(i.td):
		return invalid("SPIFFE ID %q is not in this server's trust domain %q", id, i.td.Name())
	case id.Path() == "":
		return invalid("SPIFFE ID %q has no path: it names a trust domain, not a workload", id)
	case id.Path() == reservedPath || strings.HasPrefix(id.Path(), reservedPath+"/"):
		return invalid("SPIFFE ID %q is not a workload's: the namespace %s/ is reserved", id, reservedPath)
	case len(id.String()) > entry.MaxSPIFFEID:
		return invalid("SPIFFE ID is %d bytes long; the most is %d", len(id.String()), entry.MaxSPIFFEID)
	}
	return nil
}

func validateTTL(ttl time.Duration) error {
	if ttl < 0 {
		return invalid("a lifetime of %s is negative", ttl)
	}
	if ttl > 0 && ttl < time.Second {
		return invalid("a lifetime of %s is shorter than a second", ttl)
	}
	return nil
}
