package exchange

import (
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"net/url"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/hallmark-id/hallmark/pkg/issuer"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/server/issue"
)

// What a request may be. RFC 8693 §2.1 and §3, RFC 7523 §2.
const (
	grantExchange  = "urn:ietf:params:oauth:grant-type:token-exchange"
	grantAssertion = "urn:ietf:params:oauth:grant-type:jwt-bearer"
	grantClient    = "client_credentials"

	clientAssertion = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

	typeJWT  = "urn:ietf:params:oauth:token-type:jwt"
	typeID   = "urn:ietf:params:oauth:token-type:id_token"
	typeX509 = "urn:hallmark:token-type:x509-svid"
	typeWIT  = "urn:hallmark:token-type:wit-svid"
)

const (
	maxParameters = 100
	maxReason     = 2048 // bytes of an error's description
	maxLogged     = 60   // selectors in a record
)

// request is what was asked for.
type request struct {
	grant    string
	token    string // the evidence
	invalid  string // the error of a token that is not good
	client   string // client_id; empty: none
	kind     string // the type that is asked for
	audience []string
	spiffeID string
	csr      []byte       // of typeX509
	key      issue.WITKey // of typeWIT
}

// failure is why there is no token. RFC 6749 §5.2.
type failure struct {
	status      int
	code        string
	description string
}

func refuse(code, format string, args ...any) *failure {
	status := http.StatusBadRequest
	if code == "invalid_client" {
		status = http.StatusUnauthorized
	}
	return &failure{status, code, fmt.Sprintf(format, args...)}
}

func unavailable(format string, args ...any) *failure {
	return &failure{http.StatusServiceUnavailable, "temporarily_unavailable", fmt.Sprintf(format, args...)}
}

func tooMany() *failure {
	return &failure{http.StatusTooManyRequests, "temporarily_unavailable", "too many requests; try again later"}
}

// parse reads a request.
func (x *Exchange) parse(r *http.Request) (*request, *failure) {
	if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || kind != "application/x-www-form-urlencoded" {
		return nil, refuse("invalid_request", "the request is not of type application/x-www-form-urlencoded")
	}
	if r.URL.RawQuery != "" { // which proxies write into their logs
		return nil, refuse("invalid_request", "parameters belong into the body of the request, not into the URL")
	}
	if r.Header.Get("Authorization") != "" { // RFC 7521 §4.2: one way at a time
		return nil, refuse("invalid_client", "there is no other authentication than by the token; leave the header Authorization out")
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, MaxBody+1))
	if err != nil || len(body) > MaxBody {
		return nil, refuse("invalid_request", "the request is longer than %d bytes, or broke off", MaxBody)
	}
	if strings.Count(string(body), "&") >= maxParameters {
		return nil, refuse("invalid_request", "the request has more than %d parameters", maxParameters)
	}
	form, err := url.ParseQuery(string(body))
	if err != nil {
		return nil, refuse("invalid_request", "the request is no form")
	}
	for name, values := range form {
		if len(values) > 1 && name != "audience" && name != "resource" { // RFC 6749 §3.2, RFC 8693 §2.1
			return nil, refuse("invalid_request", "parameter %.40q is there more than once", name)
		}
		for _, v := range values {
			if !utf8.ValidString(v) {
				return nil, refuse("invalid_request", "parameter %.40q is not UTF-8", name)
			}
			if v == "" && len(values) == 1 { // RFC 6749 §3.2: as if it were left out
				form.Del(name)
			}
		}
	}
	q := &request{grant: form.Get("grant_type"), client: form.Get("client_id"), spiffeID: form.Get("spiffe_id")}
	if failed := q.evidence(form); failed != nil {
		return nil, failed
	}
	if form.Has("scope") {
		return nil, refuse("invalid_scope", "there are no scopes; leave scope out")
	}
	return q, x.wanted(form, q)
}

// evidence finds the token that the grant is about.
func (q *request) evidence(form url.Values) *failure {
	q.invalid = "invalid_grant"
	name := ""
	switch q.grant {
	case "":
		return refuse("invalid_request", "grant_type is missing")
	case grantExchange:
		q.invalid, name = "invalid_request", "subject_token" // RFC 8693 §2.2.2
		switch kind := form.Get("subject_token_type"); {
		case form.Has("actor_token") != form.Has("actor_token_type"):
			return refuse("invalid_request", "actor_token and actor_token_type belong together")
		case form.Has("actor_token"):
			return refuse("invalid_request", "there is no delegation; leave actor_token out")
		case kind == "":
			return refuse("invalid_request", "subject_token_type is missing")
		case kind != typeJWT && kind != typeID:
			return refuse("invalid_request", "subject_token_type is neither %s nor %s", typeJWT, typeID)
		}
	case grantAssertion:
		name = "assertion"
	case grantClient:
		q.invalid, name = "invalid_client", "client_assertion" // RFC 7523 §3.2
		if form.Has("client_secret") {
			return refuse("invalid_request", "client_secret and client_assertion are two ways of authentication; leave client_secret out")
		}
		if form.Get("client_assertion_type") != clientAssertion {
			return refuse("invalid_request", "client_assertion_type is not %s", clientAssertion)
		}
	default:
		return refuse("unsupported_grant_type", "grant_type is none of %s, %s and %s", grantExchange, grantAssertion, grantClient)
	}
	for _, other := range []string{"subject_token", "assertion", "client_assertion", "client_secret"} {
		if other != name && form.Has(other) {
			return refuse("invalid_request", "%s does not go with this grant_type", other)
		}
	}
	if q.token = form.Get(name); q.token == "" {
		return refuse("invalid_request", "%s is missing", name)
	}
	if len(q.token) > issuer.MaxToken {
		return refuse(q.invalid, "the token is %d bytes long; the most is %d", len(q.token), issuer.MaxToken)
	}
	return nil
}

// wanted reads what is asked for.
func (x *Exchange) wanted(form url.Values, q *request) *failure {
	q.kind = form.Get("requested_token_type")
	if q.kind == "" {
		q.kind = typeJWT
	}
	q.audience = form["audience"]
	for _, resource := range form["resource"] {
		u, err := url.Parse(resource)
		if err != nil || !u.IsAbs() || u.Fragment != "" || strings.HasSuffix(resource, "#") { // RFC 8693 §2.1
			return refuse("invalid_target", "a resource is no absolute URI without fragment")
		}
		q.audience = append(q.audience, resource)
	}
	bytesOf := func(name string) ([]byte, *failure) {
		data, err := base64.StdEncoding.Strict().DecodeString(form.Get(name))
		if err != nil || len(data) == 0 {
			return nil, refuse("invalid_request", "%s is missing or not base64 of DER", name)
		}
		return data, nil
	}
	var failed *failure
	switch {
	case q.kind != typeJWT && q.kind != typeX509 && (q.kind != typeWIT || !x.o.WIT):
		return refuse("invalid_request", "requested_token_type is none that is issued here")
	case q.kind != typeJWT && q.grant != grantExchange:
		return refuse("invalid_request", "requested_token_type goes with token exchange alone")
	case q.kind == typeJWT:
		if len(q.audience) == 0 {
			return refuse("invalid_target", "audience is missing: name whom the JWT-SVID is for")
		}
		if err := issue.ValidateAudience(q.audience); err != nil { // before the token, which is good once
			return refuse("invalid_target", "%v", err)
		}
	case len(q.audience) > 0:
		return refuse("invalid_target", "an SVID of this type has no audience")
	case q.kind == typeX509:
		if q.csr, failed = bytesOf("csr"); failed != nil {
			return failed
		}
		if _, err := issue.ParseCSR(q.csr); err != nil { // likewise
			return refuse("invalid_request", "%v", err)
		}
	default:
		if q.key.PKIX, failed = bytesOf("public_key"); failed != nil {
			return failed
		}
		q.key.Algorithm = form.Get("signing_algorithm")
	}
	return nil
}

// record is what the log says of a request: never a token.
type record struct {
	issuer, subject, jti string
	selectors            selector.Set
	entry, id            string
	cause                error // that is not told
}

func (x *Exchange) serveToken(w http.ResponseWriter, r *http.Request) {
	began := x.o.Now()
	var say record
	var q *request
	var out *answer
	failed := (*failure)(nil)
	if err := x.o.LimitAddress(r.Context(), r.RemoteAddr); err != nil {
		failed = tooMany()
	} else if q, failed = x.parse(r); failed == nil {
		out, failed = x.grant(r.Context(), q, &say)
	}
	x.audit(r, q, &say, failed, began)
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store") // RFC 6749 §5.1
	h.Set("Pragma", "no-cache")
	h.Set("X-Content-Type-Options", "nosniff")
	if failed == nil {
		_ = json.NewEncoder(w).Encode(out)
		return
	}
	if failed.status >= http.StatusTooManyRequests {
		h.Set("Retry-After", "15")
	}
	w.WriteHeader(failed.status)
	_ = json.NewEncoder(w).Encode(map[string]string{"error": failed.code, "error_description": describable(failed.description)})
}

// describable makes a text that an error's description may be: RFC 6749 §5.2
// allows no quotation marks, backslashes and nothing but ASCII.
func describable(text string) string {
	if len(text) > maxReason {
		text = text[:maxReason]
	}
	return strings.Map(func(r rune) rune {
		switch {
		case r == '"':
			return '\''
		case r < ' ' || r > '~' || r == '\\':
			return '?'
		}
		return r
	}, text)
}

// audit records a request as calls of the APIs are.
func (x *Exchange) audit(r *http.Request, q *request, say *record, failed *failure, began time.Time) {
	outcome := "OK"
	if failed != nil {
		outcome = failed.code
	}
	name := say.issuer
	if name == "" {
		name = "unknown"
	}
	x.o.Metrics.TokenExchanges.WithLabelValues(name, outcome).Inc()
	attrs := []slog.Attr{slog.String("method", "token endpoint"), slog.String("address", r.RemoteAddr)}
	if q != nil {
		attrs = append(attrs, slog.String("grant", q.grant[strings.LastIndexByte(q.grant, ':')+1:]), slog.String("asked_for", q.kind))
		if len(q.audience) > 0 {
			attrs = append(attrs, slog.String("audience", clip(strings.Join(q.audience[:min(len(q.audience), 20)], " "))))
		}
	}
	for _, a := range []struct{ key, value string }{{"issuer", say.issuer}, {"subject", say.subject}, {"jti", say.jti}, {"entry", say.entry}, {"id", say.id}} {
		if a.value != "" {
			attrs = append(attrs, slog.String(a.key, clip(a.value)))
		}
	}
	attrs = append(attrs, slog.String("outcome", outcome), slog.Duration("took", x.o.Now().Sub(began)))
	if failed != nil {
		attrs = append(attrs, slog.String("error", clip(failed.description)))
		if len(say.selectors) > 0 {
			attrs = append(attrs, slog.Any("selectors", say.selectors[:min(len(say.selectors), maxLogged)].Strings()))
		}
	}
	if say.cause != nil {
		attrs = append(attrs, slog.String("cause", say.cause.Error()))
	}
	x.o.Log.LogAttrs(r.Context(), slog.LevelInfo, "audit", attrs...)
}

// clip bounds what a caller or an issuer wrote.
func clip(s string) string {
	const most = 512 // bytes
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// serveMetadata answers as RFC 8414 §3.2 has it.
func (x *Exchange) serveMetadata(w http.ResponseWriter, _ *http.Request) {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "public, max-age=300")
	h.Set("X-Content-Type-Options", "nosniff")
	_ = json.NewEncoder(w).Encode(map[string]any{
		"issuer":                                x.o.Issuer,
		"token_endpoint":                        x.endpointURL(),
		"response_types_supported":              []string{}, // there is no authorization endpoint
		"grant_types_supported":                 []string{grantExchange, grantAssertion, grantClient},
		"token_endpoint_auth_methods_supported": []string{"none", "private_key_jwt"},
		"token_endpoint_auth_signing_alg_values_supported": []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512"},
	})
}

// pemOf writes certificates as PEM.
func pemOf(der [][]byte) string {
	var b strings.Builder
	for _, one := range der {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: one})
	}
	return b.String()
}
