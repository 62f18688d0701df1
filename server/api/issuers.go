package api

import (
	"context"

	"google.golang.org/grpc/codes"

	"github.com/hallmark-id/hallmark/pkg/issuer"
	"github.com/hallmark-id/hallmark/pkg/selector"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// Bounds of answers: they are for people.
const (
	maxMatches  = 50
	maxFindings = 1000
)

var errNoExchange = callErrorf(codes.FailedPrecondition, "this server takes no tokens of outside issuers; set token_exchange in its configuration")

// ExplainToken says what the token endpoint would make of a token.
func (s *adminService) ExplainToken(ctx context.Context, req *hallmarkv1.ExplainTokenRequest) (*hallmarkv1.ExplainTokenResponse, error) {
	switch {
	case s.exchange == nil:
		return nil, errNoExchange
	case req.Token == "":
		return nil, invalidArgument("no token was given")
	case len(req.Token) > issuer.MaxToken:
		return nil, invalidArgument("the token is %d bytes long; the most is %d", len(req.Token), issuer.MaxToken)
	}
	e := s.exchange.Explain(ctx, req.Token)
	resp := &hallmarkv1.ExplainTokenResponse{
		Issuer: e.Issuer, Accepted: issuer.Passed(e.Checks), Selectors: selectorRecords(e.Selectors), Total: int32(len(e.Entries)),
	}
	if !e.Parent.IsZero() {
		resp.ParentId = e.Parent.String()
	}
	for _, c := range e.Checks {
		made := &hallmarkv1.TokenCheck{Name: c.Name}
		if c.Err != nil {
			made.Failure = c.Err.Error()
		}
		resp.Checks = append(resp.Checks, made)
	}
	for _, m := range e.Entries[:min(len(e.Entries), maxMatches)] {
		resp.Matches = append(resp.Matches, &hallmarkv1.TokenMatch{
			Entry: m.Entry.Record(), Matched: m.Matches(), Expired: m.Expired, Missing: selectorRecords(m.Missing),
		})
	}
	return resp, nil
}

// LintIssuers looks for what lets in more than is meant.
func (s *adminService) LintIssuers(context.Context, *hallmarkv1.LintIssuersRequest) (*hallmarkv1.LintIssuersResponse, error) {
	if s.exchange == nil {
		return nil, errNoExchange
	}
	all := s.exchange.Lint()
	resp := &hallmarkv1.LintIssuersResponse{Total: int32(len(all))}
	for _, f := range all[:min(len(all), maxFindings)] {
		made := &hallmarkv1.IssuerFinding{Issuer: f.Issuer, Says: f.Says, Remedy: f.Remedy}
		if f.Entry != nil {
			made.EntryId, made.SpiffeId = f.Entry.ID, f.Entry.SPIFFEID.String()
		}
		resp.Findings = append(resp.Findings, made)
	}
	return resp, nil
}

func selectorRecords(all []selector.Selector) (out []*hallmarkv1.Selector) {
	for _, s := range all {
		out = append(out, &hallmarkv1.Selector{Type: s.Type, Value: s.Value})
	}
	return out
}
