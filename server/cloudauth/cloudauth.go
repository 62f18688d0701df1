// Package cloudauth finds the credentials that the server itself has in a cloud, in
// the places where the cloud's own tools find them: the environment, files, and the
// service of the machine or cluster that it runs on. [AWS] signs requests; a [Tokens]
// of [Google] or [Azure] has bearer tokens. They are renewed as they end; errors tell
// none of them.
package cloudauth

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/google"
)

const (
	askTime  = 5 * time.Second // of one question for a token
	maxWords = 300             // characters of an error that are passed on
)

// Tokens has bearer tokens (RFC 6750) for one service.
type Tokens interface {
	// Token returns one that is good for a while.
	Token(ctx context.Context) (string, error)
}

// AWS returns the credentials for a region, of a profile of AWS's files; empty: the
// usual one.
func AWS(ctx context.Context, region, profile string) (aws.CredentialsProvider, error) {
	c, err := config.LoadDefaultConfig(ctx, config.WithRegion(region), config.WithSharedConfigProfile(profile))
	if err != nil {
		return nil, fmt.Errorf("find credentials of AWS: %w", err)
	}
	return c.Credentials, nil
}

type googleTokens struct{ source oauth2.TokenSource }

// Google returns the tokens of a scope.
func Google(scope string) (Tokens, error) {
	// The context is kept for later tokens, which are not of any question alone.
	ctx := context.WithValue(context.Background(), oauth2.HTTPClient, &http.Client{Timeout: askTime})
	c, err := google.FindDefaultCredentials(ctx, scope)
	if err != nil {
		return nil, fmt.Errorf("find credentials of Google Cloud: %w", err)
	}
	return googleTokens{oauth2.ReuseTokenSource(nil, c.TokenSource)}, nil
}

func (g googleTokens) Token(context.Context) (string, error) {
	token, err := g.source.Token()
	if err != nil {
		var refused *oauth2.RetrieveError
		if errors.As(err, &refused) { // its text has the whole answer
			return "", fmt.Errorf("token of Google Cloud: it answered %s (%.100s)", refused.Response.Status, refused.ErrorCode)
		}
		return "", fmt.Errorf("token of Google Cloud: %w", err)
	}
	return token.AccessToken, nil
}

type azureTokens struct {
	scope      string
	credential azcore.TokenCredential
}

// Azure returns the tokens of a scope.
func Azure(scope string) (Tokens, error) {
	var sources []azcore.TokenCredential
	if c, err := azidentity.NewEnvironmentCredential(nil); err == nil {
		sources = append(sources, c)
	}
	if c, err := azidentity.NewWorkloadIdentityCredential(nil); err == nil {
		sources = append(sources, c)
	}
	managed, err := azidentity.NewManagedIdentityCredential(nil)
	if err != nil {
		return nil, fmt.Errorf("find credentials of Azure: %w", err)
	}
	chain, err := azidentity.NewChainedTokenCredential(append(sources, managed), nil)
	if err != nil {
		return nil, fmt.Errorf("find credentials of Azure: %w", err)
	}
	return azureTokens{scope, chain}, nil
}

func (a azureTokens) Token(ctx context.Context) (string, error) {
	token, err := a.credential.GetToken(ctx, policy.TokenRequestOptions{Scopes: []string{a.scope}})
	if err != nil {
		text, _, _ := strings.Cut(err.Error(), "\n") // the rest is a trace of HTTP
		return "", fmt.Errorf("token of Azure: %.*s", maxWords, text)
	}
	return token.Token, nil
}
