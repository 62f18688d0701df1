package statuslist

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
)

const (
	// maxLists is how many lists a [Checker] holds: at most 64 MiB, and 8 MiB of
	// those that hallmark makes. The one that was used least lately goes.
	maxLists = 64
	// maxFetches is how many lists are fetched at once.
	maxFetches = 8
	// fetchTimeout is how long fetching one may take.
	fetchTimeout = 5 * time.Second
	// retryAfter is how long a failure stands before another attempt.
	retryAfter = 2 * time.Second
	// maxRedirects is how many are followed for one list. TSL §8.1.
	maxRedirects = 3
	// defaultTTL is how long a list is held that does not say.
	defaultTTL = time.Minute
)

// Errors of [Checker.Check], which are wrapped.
var (
	// ErrNotValid means that the token was revoked or suspended.
	ErrNotValid = errors.New("the token is not valid any more")
	// ErrNoStatus means that the token does not say where its status is.
	ErrNoStatus = errors.New("the token has no status list")
	// ErrUnavailable means that no good list could be had.
	ErrUnavailable = errors.New("the status list cannot be had")
)

// Options of [NewChecker].
type Options struct {
	// Hosts are those from which lists are fetched, host or host:port as the URIs in
	// tokens have them. A token that names another is refused, and a redirect to
	// another: what is in a token decides nothing about who is called. At least one.
	Hosts []string
	// Bundles returns the bundle of a trust domain, or nil if it is not trusted. It
	// is required.
	Bundles func(spiffeid.TrustDomain) *bundle.Bundle
	// FailOpen accepts a token while no good list can be had, unless the last good
	// one says that it is not valid. Default: such a token is refused.
	FailOpen bool
	// AllowNone accepts a token without a status list. Default: it is refused.
	AllowNone bool
	// AllowLoopback allows http URIs of this machine, for trials. Default: https
	// alone.
	AllowLoopback bool
	// Transport carries requests. Nil: [http.DefaultTransport].
	Transport http.RoundTripper
	Now       func() time.Time // nil: time.Now
}

// Checker asks for the status of tokens. It holds the lists that it has fetched
// for as long as they say. It is safe for concurrent use.
type Checker struct {
	o       Options
	client  http.Client
	tickets chan struct{}

	mu    sync.Mutex
	held  map[where]*list.Element // of *entry
	order list.List               // the one used last first
}

// where is a list: each trust domain's are its own.
type where struct {
	td  spiffeid.TrustDomain
	uri string
}

// entry is a list that is held, or was tried to fetch.
type entry struct {
	at        where
	token     *Token // the last good one; nil: none yet
	goodUntil time.Time
	failed    error // of the last attempt
	notBefore time.Time
	flight    chan struct{} // closed at its end; nil: none is under way
}

// NewChecker makes a checker. It fails if what is required is missing.
func NewChecker(o Options) (*Checker, error) {
	if len(o.Hosts) == 0 || slices.Contains(o.Hosts, "") || o.Bundles == nil {
		return nil, errors.New("check statuses: name the hosts that lists are fetched from, and the bundles that verify them")
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	c := &Checker{o: o, tickets: make(chan struct{}, maxFetches), held: make(map[where]*list.Element)}
	c.client = http.Client{Transport: o.Transport, CheckRedirect: func(to *http.Request, via []*http.Request) error {
		if len(via) > maxRedirects {
			return fmt.Errorf("it redirects more than %d times", maxRedirects)
		}
		if err := c.allowed(to.URL.String()); err != nil {
			return fmt.Errorf("it redirects, and %w", err)
		}
		return nil
	}}
	return c, nil
}

// Check fails if a token that is valid by itself was revoked, or is not known not
// to be: by the claims of the token, whose subject is in the trust domain. It
// may fetch the list, which takes 5 seconds at most.
func (c *Checker) Check(ctx context.Context, td spiffeid.TrustDomain, claims map[string]any) error {
	ref, ok, err := ReferenceOf(claims)
	switch {
	case err != nil:
		return err
	case !ok && c.o.AllowNone:
		return nil
	case !ok:
		return ErrNoStatus
	}
	if err := c.allowed(ref.URI); err != nil {
		return err
	}
	token, err := c.list(ctx, where{td, ref.URI})
	if err != nil && !(c.o.FailOpen && errors.Is(err, ErrUnavailable)) {
		return err
	}
	if token == nil {
		return nil // it fails open
	}
	status, ok := token.List.Status(ref.Index)
	switch {
	case !ok:
		return fmt.Errorf("the token's index %d is not in its status list, which has %d", ref.Index, token.List.Len())
	case status != Valid:
		return fmt.Errorf("%w: it is %v", ErrNotValid, status)
	}
	return nil
}

// allowed checks a URI that a token names, or that one leads to.
func (c *Checker) allowed(uri string) error {
	u, err := url.Parse(uri)
	switch {
	case err != nil || u.Host == "" || u.User != nil || u.Opaque != "" || u.Fragment != "":
		return errors.New("the status list is at no URL of a host")
	case !slices.Contains(c.o.Hosts, u.Host):
		return fmt.Errorf("the status list is at host %.200q, which is none of those allowed", u.Host)
	case u.Scheme == "https":
	case u.Scheme == "http" && c.o.AllowLoopback && isLoopback(u.Hostname()):
	default:
		return errors.New("the status list is not at an https URL")
	}
	return nil
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// list returns the list that is at a place: one that is held, or a fresh one. If
// that fails, the error comes with the last good one, if there is any.
func (c *Checker) list(ctx context.Context, at where) (*Token, error) {
	b := c.o.Bundles(at.td)
	if b == nil {
		return nil, fmt.Errorf("no bundle for trust domain %q", at.td.Name())
	}
	for {
		c.mu.Lock()
		e := c.entry(at)
		now := c.o.Now()
		switch {
		case e.token != nil && e.token.trusted(b) && now.Before(e.goodUntil):
			token := e.token
			c.mu.Unlock()
			return token, nil
		case e.failed != nil && now.Before(e.notBefore):
			token, err := e.token, e.failed
			c.mu.Unlock()
			return token, err
		case e.flight != nil:
			flight := e.flight
			c.mu.Unlock()
			select {
			case <-flight:
			case <-ctx.Done():
				return nil, fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
			}
			continue
		}
		e.flight = make(chan struct{})
		c.mu.Unlock()
		return c.refresh(ctx, e, b)
	}
}

// entry returns that of a place, and makes it the one used last. The mutex is
// held.
func (c *Checker) entry(at where) *entry {
	if place := c.held[at]; place != nil {
		c.order.MoveToFront(place)
		return place.Value.(*entry)
	}
	e := &entry{at: at}
	c.held[at] = c.order.PushFront(e)
	if c.order.Len() > maxLists {
		last := c.order.Back()
		delete(c.held, last.Value.(*entry).at)
		c.order.Remove(last)
	}
	return e
}

// refresh fetches a list for all that wait for it.
func (c *Checker) refresh(ctx context.Context, e *entry, b *bundle.Bundle) (*Token, error) {
	token, err := c.fetch(ctx, e.at.uri, b)
	c.mu.Lock()
	defer c.mu.Unlock()
	close(e.flight)
	e.flight = nil
	now := c.o.Now()
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrUnavailable, err)
		if ctx.Err() == nil { // else whoever waits tries on
			e.failed, e.notBefore = err, now.Add(retryAfter)
		}
		return e.token, err
	}
	ttl := token.TTL
	if ttl == 0 {
		ttl = defaultTTL
	}
	e.token, e.failed = token, nil
	if e.goodUntil = now.Add(ttl); !token.ExpiresAt.IsZero() && token.ExpiresAt.Before(e.goodUntil) {
		e.goodUntil = token.ExpiresAt
	}
	return token, nil
}

// fetch gets a list and verifies it. TSL §8.1, §8.2.
func (c *Checker) fetch(ctx context.Context, uri string, b *bundle.Bundle) (*Token, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	select {
	case c.tickets <- struct{}{}:
		defer func() { <-c.tickets }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, uri, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", MediaType)
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("GET %s: %s", uri, resp.Status)
	}
	if media, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err != nil || media != MediaType {
		return nil, fmt.Errorf("GET %s: it is %.100q, not %s", uri, resp.Header.Get("Content-Type"), MediaType)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, MaxToken+1)) // after gzip was undone
	if err != nil {
		return nil, fmt.Errorf("GET %s: %w", uri, err)
	}
	token, err := Verify(string(body), uri, b, c.o.Now())
	if err != nil {
		return nil, fmt.Errorf("GET %s: %w", uri, err)
	}
	return token, nil
}
